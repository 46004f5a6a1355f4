"""lmms-eval and VLMEvalKit: how they are run, and how their results and answers are read."""
