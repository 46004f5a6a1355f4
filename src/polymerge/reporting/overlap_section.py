"""The page's overlap section: heat maps over layers and modules, norms by layer, and a table of all tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from math import hypot
from typing import Annotated, Any, Final

from msgspec import Meta, Struct, to_builtins

from polymerge.analysis.figures import MODULES
from polymerge.charts import Series, figure, heat_map, line_chart
from polymerge.reporting.records import Count, Number, Source

__all__ = ["UNRELATED", "overlap_section"]

Row = dict[str, Any]

UNRELATED: Final = 0.29
"""Share of mass that cancels between two independent normal deltas of equal scale: 1 - 1/sqrt(2)."""

_MEASURES = (
    ("conflict_mass", "conflict by mass", "share of the deltas' mass that cancels when they are added up", False),
    ("conflict", "conflict of signs", "share of the entries that two or more change at which signs differ", False),
    ("cosine", "cosine", "of the deltas as vectors, mean over all pairs", True),
    ("common", "kept by both", "of the largest entries that either delta keeps, the share that both keep", False),
    ("left", "shared outputs", "what two deltas share of the spaces of their largest left singular vectors", False),
    ("right", "shared inputs", "what two deltas share of the spaces of their largest right singular vectors", False),
)
_PAIRED = ("cosine", "common", "left", "right")
_COLUMNS = ("name", "entries", "cosine", "conflict", "conflict_mass", "common", "left", "right")


class Pair(Struct):
    """The figures of two deltas."""

    cosine: Number | None = None
    common: Number | None = None
    left: Number | None = None
    right: Number | None = None


class Delta(Struct):
    """The figures of one delta."""

    model: str
    norm: Number | None = None
    kept: Number | None = None
    rank_share: Number | None = None


class Place(Struct, kw_only=True):
    """The figures of a tensor, of a place in the model, or of everything."""

    name: str
    part: str
    layer: Count | None = None
    module: str
    reference: str
    tensors: Count
    entries: Count
    conflict: Number | None = None
    conflict_mass: Number | None = None
    pairs: list[Pair]
    deltas: list[Delta]


class Overlap(Struct, kw_only=True):
    """The members of overlap.json that the page shows."""

    plan_hash: str
    density: Number
    rank: Count | None = None
    notes: list[str]
    totals: Annotated[list[Place], Meta(min_length=1)]
    places: list[Place]
    tensors: list[Place]


def overlap_section(source: Source) -> dict[str, Any]:
    """The page's section on an overlap.

    raises RecipeError, or Refused for several problems.
    """
    record = source.read(Overlap)
    places, totals, tensors = (
        [_row(one) for one in all_of] for all_of in (record.places, record.totals, record.tensors)
    )
    return {
        "label": source.label,
        "file": str(source.file),
        "plan_hash": record.plan_hash,
        "density": record.density,
        "rank": record.rank,
        "models": list(dict.fromkeys(delta["model"] for row in totals for delta in row["deltas"])),
        "unrelated": UNRELATED,
        "notes": record.notes,
        "totals": totals,
        "places": places,
        "tensors": [[row[name] for name in _COLUMNS] for row in tensors],
        "tensor_columns": list(_COLUMNS),
        "tensors_all": len(tensors),
        "charts": list(_charts(places)),
    }


def _row(place: Place) -> Row:
    row: Row = to_builtins(place)
    if not row.pop("pairs"):
        row["conflict"] = row["conflict_mass"] = None  # a delta alone conflicts with nothing
    return row | {name: _mean(getattr(pair, name) for pair in place.pairs) for name in _PAIRED}


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _charts(places: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Charts over the text tower's layers, one set for deltas from the base and one for deltas from the template."""
    layered = sorted((row for row in places if row["layer"] is not None), key=lambda row: str(row["reference"]))
    for reference, group in groupby(layered, key=lambda row: row["reference"]):
        yield from _of_reference(list(group), "" if reference == "base" else " (deltas from the template)")


def _of_reference(rows: Sequence[Row], more: str) -> Iterator[dict[str, Any]]:
    layers = sorted({row["layer"] for row in rows})
    held = {row["module"] for row in rows}
    modules = [module for module in MODULES if module in held] + sorted(held - set(MODULES))
    by_place: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        by_place.setdefault((row["layer"], row["module"]), []).append(row)
    maps = {}
    for name, measure, about, diverging in _MEASURES:
        values = [[_mean(row[name] for row in by_place.get((layer, one), ())) for layer in layers] for one in modules]
        if any(value is not None for line in values for value in line):
            maps[measure] = heat_map(
                f"Overlap by layer and module{more}", ("layer", layers), ("module", modules), measure, values,
                about=about, diverging=diverging,
            )  # fmt: skip
    if maps:
        yield figure(maps)
    models = list(dict.fromkeys(delta["model"] for row in rows for delta in row["deltas"]))
    series = {model: Series([_norm(rows, layer, model) for layer in layers]) for model in models}
    if len(layers) > 1:
        norms = line_chart(f"Norms of the deltas{more}", ("layer", layers), "Frobenius norm of a layer", series)
        yield figure({"": norms})


def _norm(rows: Sequence[Row], layer: int, model: str) -> float | None:
    found = [
        delta["norm"]
        for row in rows
        for delta in row["deltas"]
        if row["layer"] == layer and delta["model"] == model and delta["norm"] is not None
    ]
    return hypot(*found) if found else None
