"""The outcome of a search for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["describe_search"]


def describe_search(outcome: Mapping[str, Any]) -> str:
    """A line for each value with its difference and score, and what was chosen.

    outcome  what search.json holds
    """
    names = [outcome["vary"]] if isinstance(outcome["vary"], str) else outcome["vary"]
    differences = dict(zip(outcome.get("candidates", ()), outcome.get("differences", ()), strict=True))
    scores = outcome.get("scores") or [None] * len(outcome["values"])
    head = [", ".join(names), "difference" if differences else "", "score" if outcome.get("scores") else ""]
    rows = [head, *(_row(value, differences, score) for value, score in zip(outcome["values"], scores, strict=True))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    marks = ["", *("  <- chosen" if value == outcome["chosen"] else "" for value in outcome["values"])]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + mark
        for row, mark in zip(rows, marks, strict=True)
    ]
    lines.append(f"chosen by {outcome['chosen_by']}: {', '.join(names)} = {_words(outcome['chosen'])}")
    minima = outcome.get("minima", ())
    if len(minima) > 1 and outcome["chosen_by"] == outcome.get("criterion"):
        lines.append(f"as small at {', '.join(map(_words, minima))}; the smallest of them is taken")
    return "\n".join(lines)


def _row(value: Any, differences: Mapping[float, float], score: float | None) -> list[str]:
    apart = None if isinstance(value, list) else differences.get(value)
    return [_words(value), "" if apart is None else f"{apart:g}", "" if score is None else f"{score:.2f}"]


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
