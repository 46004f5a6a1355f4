"""Charts of an overlap, for the page and for notebooks: heat maps over layers and modules, norms by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from math import hypot
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from polymerge.analysis.places import MODULES
from polymerge.charts import Series, heat_map, line_chart
from polymerge.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    import altair as alt

__all__ = ["overlap_chart", "overlap_charts", "with_means"]

Row = Mapping[str, Any]


class Measure(NamedTuple):
    """A figure that a heat map shows: its title, what it is, and whether 0 lies in the middle of its scale."""

    title: str
    about: str
    diverging: bool = False


_MEASURES: Final = {
    "conflict_mass": Measure("conflict by mass", "share of the deltas' mass that cancels when they are added up"),
    "sign_conflict": Measure("conflict of signs", "share of the entries that two or more change at which signs differ"),
    "cosine": Measure("cosine", "of the deltas as vectors, mean over all pairs", diverging=True),
    "common": Measure("kept by both", "of the largest entries that either delta keeps, the share that both keep"),
    "left": Measure("shared outputs", "what two deltas share of the spaces of their largest left singular vectors"),
    "right": Measure("shared inputs", "what two deltas share of the spaces of their largest right singular vectors"),
}
_PAIRED: Final = ("cosine", "common", "left", "right")
_STORED: Final = {"sign_conflict": "conflict"}  # what overlap.json calls a measure
_NORMS: Final = "norms"


def with_means(place: Row) -> dict[str, Any]:
    """A place of overlap.json with the means of what each pair of deltas has its own of, instead of its pairs."""
    row = dict(place)
    pairs = row.pop("pairs")
    if not pairs:
        row["conflict"] = row["conflict_mass"] = None  # a delta alone conflicts with nothing
    return row | {name: _mean(pair[name] for pair in pairs) for name in _PAIRED}


def overlap_chart(places: Sequence[Row], measure: str) -> list[alt.LayerChart]:
    """The charts of one measure, or of the norms of the deltas (`norms`).

    places  as for `overlap_charts`

    raises RecipeError for another measure.
    """
    if measure not in (*_MEASURES, _NORMS):
        raise RecipeError(f"there is no measure '{measure}'.{did_you_mean(measure, (*_MEASURES, _NORMS))}")
    return [charts[measure] for charts in overlap_charts(places) if measure in charts]


def overlap_charts(places: Sequence[Row]) -> Iterator[dict[str, alt.LayerChart]]:
    """The charts over the text tower's layers, by measure: a group of heat maps, and the norms of the deltas, each
    once for deltas from the base and once for deltas from the template.

    places  rows of `with_means`
    """
    layered = sorted((row for row in places if row["layer"] is not None), key=lambda row: str(row["reference"]))
    for reference, group in groupby(layered, key=lambda row: row["reference"]):
        yield from _of_reference(list(group), "" if reference == "base" else " (deltas from the template)")


def _of_reference(rows: Sequence[Row], more: str) -> Iterator[dict[str, alt.LayerChart]]:
    layers = sorted({row["layer"] for row in rows})
    held = {row["module"] for row in rows}
    modules = [module for module in MODULES if module in held] + sorted(held - set(MODULES))
    by_place: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        by_place.setdefault((row["layer"], row["module"]), []).append(row)
    maps = {}
    for name, measure in _MEASURES.items():
        stored = _STORED.get(name, name)
        values = [[_mean(row[stored] for row in by_place.get((layer, one), ())) for layer in layers] for one in modules]
        if any(value is not None for line in values for value in line):
            maps[name] = heat_map(
                f"Overlap by layer and module{more}", ("layer", layers), ("module", modules), measure.title, values,
                about=measure.about, diverging=measure.diverging,
            )  # fmt: skip
    if maps:
        yield maps
    models = list(dict.fromkeys(delta["model"] for row in rows for delta in row["deltas"]))
    series = {model: Series([_norm(rows, layer, model) for layer in layers]) for model in models}
    if len(layers) > 1:
        title = f"Norms of the deltas{more}"
        yield {_NORMS: line_chart(title, ("layer", layers), "Frobenius norm of a layer", series)}


def _norm(rows: Sequence[Row], layer: int, model: str) -> float | None:
    found = [
        delta["norm"]
        for row in rows
        for delta in row["deltas"]
        if row["layer"] == layer and delta["model"] == model and delta["norm"] is not None
    ]
    return hypot(*found) if found else None


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
