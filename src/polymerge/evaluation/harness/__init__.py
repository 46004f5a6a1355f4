"""lmms-eval and VLMEvalKit: run on a merged model, and read."""
