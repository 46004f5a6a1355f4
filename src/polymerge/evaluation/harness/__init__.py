"""lmms-eval and VLMEvalKit: running them, and reading their results and answers."""
