"""Answers that exist already: one folder per candidate, as lmms-eval, VLMEvalKit or polymerge wrote them."""

from polymerge.evaluation.logs.reading import Logs, read_logs

__all__ = ["Logs", "read_logs"]
