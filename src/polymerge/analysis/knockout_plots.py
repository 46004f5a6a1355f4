"""Charts of a knockout and of an ablation, for the page and as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from polymerge.charts import Series, bar_chart, draw, heat_map, line_chart
from polymerge.planning.text_words import ranges

if TYPE_CHECKING:
    import altair as alt

__all__ = ["draw_curves", "draw_gains", "draw_maps", "drop_curves", "drop_maps", "gain_charts", "where"]

Outcome = Mapping[str, Any]

_NAMES: Final = {"model": "the model", "against": "the original", "difference": "model less original"}
_FEW = 4  # tasks whose bars side by side can still be told apart
_DIGITS = 9  # of points; what lies below is left by subtracting floats


def where(layers: Sequence[int]) -> str:
    """Format layers: `3`, or `0-3`."""
    return ranges(layers).replace(", ", ",")


def drop_maps(outcome: Outcome) -> list[alt.LayerChart]:
    """Heat maps of the drops, a row for each task and module, a column for each knockout: of the model, of the
    original, and of their difference where there is an original.

    outcome  the content of knockout.json
    """
    places, rows, found = _cells(outcome)
    if not places:
        return []
    # one scale for all of the maps, so that a colour means the same in each
    top = max((abs(_points(cell[who]["drop"])) for cell in outcome["cells"] for who in _shown(outcome)), default=0.0)
    about = "points lost when these layers are knocked out; below 0 something is gained"
    return [
        heat_map(
            f"Drop by layer: {_NAMES[who]}", ("layer", places), ("", [f"{task}, {module}" for task, module in rows]),
            "drop", [_drops(found, row, places, who) for row in rows], about=about, limits=(-top, top), diverging=True,
        )
        for who in _shown(outcome)
    ]  # fmt: skip


def drop_curves(outcome: Outcome) -> list[alt.LayerChart]:
    """The drops along the layers, one chart per task and module: the model, and the original if there is one.

    outcome  the content of knockout.json
    """
    places, rows, found = _cells(outcome)
    if not places:
        return []
    charts = []
    for row in rows:
        series = {}
        for who in _shown(outcome)[:2]:
            cells = [found.get((*row, place)) for place in places]
            ends = [(cell and cell[who]["interval"]) or (None, None) for cell in cells]
            low, high = [low for low, _ in ends], [high for _, high in ends]
            series[_NAMES[who]] = Series(_drops(found, row, places, who), low, high)
        banded = any(one.banded for one in series.values())
        about = "the shade holds 95 % of the resamples" if banded else ""
        title = f"Drop along the layers: {row[0]}, {row[1]}"
        charts.append(line_chart(title, ("layer", places), "points", series, about=about))
    return charts


def gain_charts(outcome: Outcome) -> list[alt.LayerChart]:
    """The gain over the template from merging each range of layers: bars, or a heat map for many tasks.

    outcome  the content of ablation.json
    """
    tasks, entries = list(outcome["tasks"]), outcome["ranges"]
    if not tasks or not entries:
        return []
    spans = [where(entry["layers"]) for entry in entries]
    names = [
        entry["name"] if entry["name"] == span else f"{entry['name']} ({span})"
        for entry, span in zip(entries, spans, strict=True)
    ]
    title, about = "Gain by the layers that are merged", "points over the template, with 95 % of the resamples"
    gains = {task: [_points(entry["tasks"][task]["gain"]) for entry in entries] for task in tasks}
    if len(tasks) > _FEW:
        values = list(gains.values())
        return [heat_map(title, ("layers", names), ("task", tasks), "gain", values, about=about, diverging=True)]
    series = {}
    for task in tasks:
        ends = [entry["tasks"][task]["interval"] or (None, None) for entry in entries]
        series[task] = Series(gains[task], [low for low, _ in ends], [high for _, high in ends])
    return [bar_chart(title, ("layers", names), "points", series, about=about)]


def draw_maps(outcome: Outcome, stem: Path) -> None:
    """Draw the heat maps of a knockout as STEM.png and STEM.svg."""
    draw(lambda: drop_maps(outcome), stem)


def draw_curves(outcome: Outcome, stem: Path) -> None:
    """Draw the curves of a knockout as STEM.png and STEM.svg."""
    draw(lambda: drop_curves(outcome), stem)


def draw_gains(outcome: Outcome, stem: Path) -> None:
    """Draw the gains of an ablation as STEM.png and STEM.svg."""
    draw(lambda: gain_charts(outcome), stem)


def _shown(outcome: Outcome) -> list[str]:
    return ["model"] if outcome["against"] is None else list(_NAMES)


def _cells(outcome: Outcome) -> tuple[list[str], list[tuple[str, str]], dict[tuple[str, str, str], Mapping[str, Any]]]:
    """The layers of each knockout, every combination of task and module, and the cell of each pair."""
    found = {(cell["task"], cell["module"], where(cell["layers"])): cell for cell in outcome["cells"]}
    rows = [(task, module) for task in outcome["tasks"] for module in outcome["modules"]]
    return list(dict.fromkeys(place for _, _, place in found)), rows, found


def _drops(
    found: Mapping[tuple[str, str, str], Mapping[str, Any]], row: tuple[str, str], places: Sequence[str], who: str
) -> list[float | None]:
    cells = [found.get((*row, place)) for place in places]
    return [None if cell is None else _points(cell[who]["drop"]) for cell in cells]


def _points(value: float) -> float:
    return round(value, _DIGITS)
