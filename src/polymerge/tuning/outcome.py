"""The outcome of a search, as values and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymerge.recipe.recipe import Recipe
from polymerge.tables import Table
from polymerge.tuning.knobs import Value

__all__ = ["CurvePoint", "Found", "SearchResult", "describe_search"]


@dataclass(frozen=True)
class CurvePoint:
    """The result for one value.

    value      by parameter, as in `Found.best`
    difference from the neighbours' answers; None if the value is not eligible
    score      by labels, in percent; None without labels
    """

    value: Mapping[str, Value]
    difference: float | None = None
    score: float | None = None


@dataclass(frozen=True)
class Found(Table):
    """The chosen values, and why.

    outcome  the content of search.json
    """

    outcome: Mapping[str, Any]

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the varied parameters."""
        vary = self.outcome["vary"]
        return (vary,) if isinstance(vary, str) else tuple(vary)

    @property
    def best(self) -> dict[str, Value]:
        """The chosen value of each parameter, such as `{"weight": 0.3}`."""
        return self._named(self.outcome["chosen"])

    @property
    def curve(self) -> list[CurvePoint]:
        """Every tried value in order, with its difference and its score."""
        outcome = self.outcome
        differences = dict(zip(outcome.get("candidates", ()), outcome.get("differences", ()), strict=True))
        scores = outcome.get("scores") or [None] * len(outcome["values"])
        return [
            CurvePoint(self._named(value), None if isinstance(value, list) else differences.get(value), score)
            for value, score in zip(outcome["values"], scores, strict=True)
        ]

    def rows(self) -> list[dict[str, Any]]:
        """One row per tried value."""
        return [
            {**point.value, "difference": point.difference, "score": point.score, "chosen": point.value == self.best}
            for point in self.curve
        ]

    def _named(self, value: Any) -> dict[str, Value]:
        values = value if isinstance(value, list) else [value]
        return dict(zip(self.parameters, values, strict=True))


@dataclass(frozen=True)
class SearchResult(Found):
    """The result of a search.

    folder   of the run
    recipe   with the chosen values, ready to be merged
    """

    folder: Path
    recipe: Recipe


def describe_search(found: Found) -> str:
    """Format each value with its difference and score, one per line, and the choice."""
    outcome, curve, names = found.outcome, found.curve, ", ".join(found.parameters)
    compared = any(point.difference is not None for point in curve)
    scored = any(point.score is not None for point in curve)
    rows = [[names, "difference" if compared else "", "score" if scored else ""]]
    rows += [
        [
            _words(point.value),
            "" if point.difference is None else f"{point.difference:g}",
            "" if point.score is None else f"{point.score:.2f}",
        ]
        for point in curve
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    marks = ["", *("  <- chosen" if point.value == found.best else "" for point in curve)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + mark
        for row, mark in zip(rows, marks, strict=True)
    ]
    lines.append(f"chosen by {outcome['chosen_by']}: {names} = {_words(found.best)}")
    minima = outcome.get("minima", ())
    if len(minima) > 1 and outcome["chosen_by"] == outcome.get("criterion"):
        lines.append(f"as small at {', '.join(map(_word, minima))}; the smallest of them is taken")
    return "\n".join(lines)


def _words(values: Mapping[str, Value]) -> str:
    return ", ".join(map(_word, values.values()))


def _word(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
