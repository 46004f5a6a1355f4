"""The outcome of a search, as values and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymerge.charts import stacked
from polymerge.recipe.recipe import Recipe
from polymerge.tables import Table, aligned
from polymerge.tuning.curve_plot import search_charts
from polymerge.tuning.knobs import Value
from polymerge.tuning.objectives import RULES

if TYPE_CHECKING:
    import altair as alt

__all__ = ["CurvePoint", "Found", "FrontPoint", "SearchResult", "describe_search"]


@dataclass(frozen=True)
class CurvePoint:
    """The result for one value.

    value      by parameter, as in `Found.best`
    difference from the neighbours' answers; None if the value is not eligible
    score      by labels, in percent; None without labels
    scores     by task, if there are several, on the prompts that every candidate was asked
    """

    value: Mapping[str, Value]
    difference: float | None = None
    score: float | None = None
    scores: Mapping[str, float] | None = None


@dataclass(frozen=True)
class FrontPoint:
    """A value on the Pareto front of several tasks: no other value is as good on all and better on one.

    value   by parameter, as in `Found.best`
    scores  by task, in percent, on all prompts
    chosen  whether it is the one that the rule takes
    """

    value: Mapping[str, Value]
    scores: Mapping[str, float]
    chosen: bool


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
        tasks = outcome.get("tasks", {})
        return [
            CurvePoint(
                self._named(value), None if isinstance(value, list) else differences.get(value), score,
                {name: one["scores"][place] for name, one in tasks.items()} or None,
            )
            for place, (value, score) in enumerate(zip(outcome["values"], scores, strict=True))
        ]  # fmt: skip

    @property
    def front(self) -> list[FrontPoint]:
        """The Pareto front of several tasks, from best to worst in the first; empty for one task."""
        outcome = self.outcome
        return [
            FrontPoint(self._named(one["value"]), one["scores"], one["value"] == outcome["chosen"])
            for one in outcome.get("front", ())
        ]

    def rows(self) -> list[dict[str, Any]]:
        """One row per tried value; with several tasks, one per value on the front."""
        if self.front:
            return [{**point.value, **point.scores, "chosen": point.chosen} for point in self.front]
        return [
            {**point.value, "difference": point.difference, "score": point.score, "chosen": point.value == self.best}
            for point in self.curve
        ]

    def plot(self) -> alt.VConcatChart:
        """Draw the curves, or the grid, the trials, the Pareto front, as a chart of altair's.

        raises RecipeError where a grid has no scores, MissingExtraError without altair or vl-convert.
        """
        return stacked(search_charts(self.outcome))

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
    """Format each value with its difference and score, one per line, and the choice; of several tasks the front."""
    if found.front:
        return _describe_front(found)
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
    lines = _marked(rows, [point.value == found.best for point in curve])
    lines.append(f"chosen by {outcome['chosen_by']}: {names} = {_words(found.best)}")
    minima = outcome.get("minima", ())
    if len(minima) > 1 and outcome["chosen_by"] == outcome.get("criterion"):
        lines.append(f"as small at {', '.join(map(_word, minima))}; the smallest of them is taken")
    return "\n".join(lines)


def _describe_front(found: Found) -> str:
    """The front, one value per line with its score on each task, and the rule of the choice."""
    outcome, names, tasks = found.outcome, ", ".join(found.parameters), found.outcome["tasks"]
    rows = [[names, *(f"{name} ({one['scorer']})" for name, one in tasks.items())]]
    rows += [[_words(point.value), *(f"{point.scores[name]:.2f}" for name in tasks)] for point in found.front]
    lines = _marked(rows, [point.chosen for point in found.front])
    quick = f", found on {outcome['quick']} prompts of each task and scored on all" if "quick" in outcome else ""
    lines.append(f"the Pareto front of {len(outcome['values'])} tried values{quick}")
    lines.append(f"chosen by {outcome['chosen_by']} ({RULES[outcome['chosen_by']]}): {names} = {_words(found.best)}")
    return "\n".join(lines)


def _marked(rows: Sequence[Sequence[str]], chosen: Sequence[bool]) -> list[str]:
    """Rows in columns, the first of which is the head; the chosen one is marked."""
    marks = ["", *("  <- chosen" if one else "" for one in chosen)]
    return [line + mark for line, mark in zip(aligned(rows, left=0), marks, strict=True)]


def _words(values: Mapping[str, Value]) -> str:
    return ", ".join(map(_word, values.values()))


def _word(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
