"""Charts of a search, for the page and as pictures: differences between neighbours, and scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from polymerge.charts import Series, draw, heat_map, line_chart

if TYPE_CHECKING:
    import altair as alt

__all__ = ["draw_search", "search_charts"]

_MOST: Final = 6
"""Pairs of tasks that are drawn."""


def search_charts(outcome: Mapping[str, Any]) -> list[alt.LayerChart]:
    """The curves of a search over one parameter, the heat map of a grid of two, or the scores of a sampler's trials.

    outcome  the content of search.json
    """
    vary = [outcome["vary"]] if isinstance(outcome["vary"], str) else outcome["vary"]
    scores = outcome.get("scores")
    if "front" in outcome:
        return list(_fronts(outcome))
    if len(vary) == 1 and "sampler" not in outcome:
        return _curves(outcome, vary[0])
    if not scores:
        return []
    score = f"score ({outcome['scorer']}, %)"
    if len(vary) == 2 and "sampler" not in outcome:
        across, down = (list(dict.fromkeys(point[place] for point in outcome["values"])) for place in (0, 1))
        by_point = {tuple(point): value for point, value in zip(outcome["values"], scores, strict=True)}
        values = [[by_point.get((one, other)) for one in across] for other in down]
        return [heat_map("Scores of the grid", (vary[0], across), (vary[1], down), score, values)]
    trials = list(range(1, len(scores) + 1))
    best = [max(scores[:trial]) for trial in trials]
    series = {"score": Series(scores), "best so far": Series(best)}
    return [line_chart("Scores of the trials", ("trial", trials), score, series, zero=False)]


def _curves(outcome: Mapping[str, Any], name: str) -> list[alt.LayerChart]:
    """Differences and scores as separate charts: with two scales in one, readers interpret the crossing of curves."""
    values = [_only(value) for value in outcome["values"]]
    chosen = _only(outcome["chosen"])
    charts = []
    if outcome.get("differences"):
        by_value = dict(zip(outcome["candidates"], outcome["differences"], strict=True))
        unit = "prompts" if outcome["compare"] == "exact" else "mean distance"
        charts.append(
            line_chart(
                "How much answers change", (name, values), f"difference to the neighbours ({unit})",
                {"difference": Series([by_value.get(value) for value in values])}, marks={"chosen": chosen},
                about="less is steadier; the ends of the grid have one neighbour and cannot be chosen",
            )
        )  # fmt: skip
    if outcome.get("scores"):
        best = _only(outcome["best"])
        marks = {"chosen": chosen} | ({} if best == chosen else {"best by labels": best})
        score, series = f"score ({outcome['scorer']}, %)", {"score": Series(outcome["scores"])}
        charts.append(line_chart("Score by labels", (name, values), score, series, marks=marks, zero=False))
    return charts


def _fronts(outcome: Mapping[str, Any]) -> Iterator[alt.LayerChart]:
    """The scores of every two tasks: of the front, joined, and of what was tried."""
    tasks, front = outcome["tasks"], outcome["front"]
    asked = f" ({outcome['quick']} prompts)" if "quick" in outcome else ""
    chosen = next(one for one in front if one["value"] == outcome["chosen"])
    for across, down in islice(combinations(tasks, 2), _MOST):
        on = sorted((one["scores"][across], one["scores"][down]) for one in front)
        tried = sorted(set(zip(tasks[across]["scores"], tasks[down]["scores"], strict=True)))
        if not asked:
            tried = [one for one in tried if one not in on]
        none: list[float | None] = [None]
        series = {
            f"front{asked and ' (all prompts)'}": Series([*(y for _, y in on), *none * len(tried)]),
            f"tried{asked}": Series([*none * len(on), *(y for _, y in tried)]),
        }
        names = [f"{name} ({tasks[name]['scorer']}, %)" for name in (across, down)]
        yield line_chart(
            f"{down} against {across}", (names[0], [x for x, _ in (*on, *tried)]), names[1], series,
            marks={"chosen": chosen["scores"][across]}, zero=False, loose=[f"tried{asked}"],
            about="no value is as good as one of the front on every task, and better on one",
        )  # fmt: skip


def _only(value: Any) -> Any:
    """The value of the single parameter, possibly wrapped in a list."""
    return value[0] if isinstance(value, list) else value


def draw_search(outcome: Mapping[str, Any], stem: Path) -> None:
    """Draw the outcome of a search as STEM.png and STEM.svg."""
    draw(lambda: search_charts(outcome), stem)
