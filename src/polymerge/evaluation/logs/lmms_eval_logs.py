"""Answers as lmms-eval logs them, with `--log_samples`.

2024: `<task>.json`, {"args": ..., "logs": [{"doc_id": 0, "resps": [["yes"]], "filtered_resps": ["yes"], ...}]}.
Since: `<stamp>_samples_<task>.jsonl`, a document a line, where `resps` is left out if it says no more than
`filtered_resps`, and what holds one response may be that response instead of a list.

What is scored is `filtered_resps`: `resps` without a model's thoughts, or what a task's filter found in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from polymerge.evaluation.logs.rows import Complaints, Documents, Row, documents, json_lines, kept

__all__ = ["log_rows", "read_lmms_eval", "response"]

_NO_METRICS = frozenset({"doc_id", "target", "doc", "arguments", "input", "resps", "filtered_resps", "doc_hash"})


def log_rows(value: Mapping[str, Any], complaints: Complaints) -> list[Row]:
    """The documents of a file of 2024."""
    logs = value.get("logs")
    if not isinstance(logs, list):
        complaints.add("'logs' is no list", "", "Generate these answers again.")
        return []
    rows = [(f"logs[{place}]", entry) for place, entry in enumerate(logs)]
    for place, entry in rows:
        if not isinstance(entry, dict):
            complaints.add("no JSON object", place, "Generate these answers again.")
    return [row for row in rows if isinstance(row[1], dict)]


def read_lmms_eval(rows: Sequence[Row] | None, keep: str | None, complaints: Complaints) -> Documents:
    """The documents of a log, each with the response that was scored.

    rows  of a file of 2024; None reads a file of today
    """
    chosen = kept(json_lines(complaints) if rows is None else rows, keep, complaints)
    several = 0

    def answer(row: Mapping[str, Any]) -> str:
        nonlocal several
        text, more = response(row)
        several += more
        return text

    answers = documents(chosen, "doc_id", answer, complaints)
    notes = (
        (f"{complaints.file}: documents with several responses, of which the first is read: {several}",)
        if several
        else ()
    )
    return Documents(answers, _score(chosen), notes)


def response(row: Mapping[str, Any]) -> tuple[str, bool]:
    """The response that was scored, and whether there are more of which it is the first.

    raises ValueError that says why there is none.
    """
    field = next((name for name in ("filtered_resps", "resps") if row.get(name) is not None), None)
    if field is None:
        raise ValueError("no response")
    return _first(row[field], field)


def _first(value: Any, field: str) -> tuple[str, bool]:
    """The first response, and whether there are more."""
    more = False
    while isinstance(value, list):
        if len(value) == 2 and value[1] in (True, False, "True", "False") and _real(value[0]) is not None:
            raise ValueError(f"a log-likelihood instead of a response in '{field}'")
        if not value:
            raise ValueError(f"an empty list in '{field}'")
        more = more or len(value) > 1
        value = value[0]
    if not isinstance(value, str):
        raise ValueError(f"no text in '{field}' but {_kind(value)}")
    return value, more


def _real(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _kind(value: Any) -> str:
    return {type(None): "null", bool: "true or false", dict: "an object"}.get(type(value), "a number")


def _score(rows: Sequence[Row]) -> float | None:
    """The mean of the one metric that every document has; None where it is not clear which that is."""
    metrics: dict[str, list[float]] = {}
    for _, fields in rows:
        for name in fields.keys() - _NO_METRICS:
            value = fields[name]
            value = value.get("score") if isinstance(value, dict) else value
            number = _real(value) if isinstance(value, int | float) else None
            if number is not None:
                metrics.setdefault(name, []).append(number)
    whole = [values for values in metrics.values() if len(values) == len(rows)]
    return math.fsum(whole[0]) / len(rows) if len(metrics) == len(whole) == 1 else None
