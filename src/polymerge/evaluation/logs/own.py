"""Answers as polymerge itself writes them: `answers.jsonl`, a line {"id": ..., "answer": ...} per prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polymerge.evaluation.logs.rows import Complaints, Documents, documents, json_lines, kept

__all__ = ["NAME", "read_own"]

NAME = "answers.jsonl"


def read_own(keep: str | None, complaints: Complaints) -> Documents:
    """The documents of an `answers.jsonl`."""
    rows = kept(json_lines(complaints), keep, complaints)
    return Documents(documents(rows, "id", _answer, complaints, repeats=True))


def _answer(fields: Mapping[str, Any]) -> str:
    answer = fields.get("answer")
    if not isinstance(answer, str):
        raise ValueError("no 'answer' that is a text")
    return answer
