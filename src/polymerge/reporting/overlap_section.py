"""An overlap as the page shows it: heat maps over layers and modules, norms by layer, and every tensor in a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from math import sqrt
from typing import Any

from polymerge.analysis.places import MODULES
from polymerge.errors import PolymergeError, RecipeError
from polymerge.reporting.charts import Chart, heat, lines, measure
from polymerge.reporting.fields import Fields
from polymerge.reporting.records import Source
from polymerge.reporting.rules.overlap_rules import UNRELATED

__all__ = ["overlap_section"]

Row = dict[str, Any]

_MEASURES = (
    ("conflict_mass", "conflict by mass", "share of the deltas' mass that cancels when they are added up", False),
    ("conflict", "conflict of signs", "share of the entries that two or more change at which signs differ", False),
    ("cosine", "cosine", "of the deltas as vectors, mean over all pairs", True),
    (
        "common",
        "kept by both",
        "of the largest entries, which either of two deltas keeps, the share that both do",
        False,
    ),
    ("left", "shared outputs", "what two deltas share of the spaces of their largest left singular vectors", False),
    (
        "right",
        "shared inputs",
        "what two deltas share of the spaces of their largest right singular vectors",
        False,
    ),
)
_PAIRED = ("cosine", "common", "left", "right")


def overlap_section(source: Source, problems: list[PolymergeError]) -> dict[str, Any]:
    """What the JSON of `polymerge overlap` says, in the page's form; what is wrong is noted in `problems`."""
    data = Fields(source.data, str(source.file), problems)
    rank = None if data.missing("rank") else data.count("rank")
    places = [_row(entry) for entry in data.objects("places")]
    totals = [_row(entry) for entry in data.objects("totals")]
    tensors = [_row(entry) for entry in data.objects("tensors")]
    if not totals:
        problems.append(RecipeError(f"{source.file}: totals is empty: nothing was compared"))
    return {
        "label": source.label,
        "file": str(source.file),
        "plan_hash": data.text("plan_hash"),
        "density": data.number("density"),
        "rank": rank,
        "models": list(dict.fromkeys(delta["model"] for row in totals for delta in row["deltas"])),
        "unrelated": UNRELATED,
        "notes": data.texts("notes"),
        "totals": totals,
        "places": places,
        "tensors": [_short(row) for row in tensors],
        "tensor_columns": ["name", "entries", "cosine", "conflict", "conflict_mass", "common", "left", "right"],
        "tensors_all": len(tensors),
        "charts": _charts(places),
    }


def _row(entry: Fields) -> Row:
    pairs = list(entry.objects("pairs"))
    deltas = [
        {"model": one.text("model"), **{name: one.number_or_none(name) for name in ("norm", "kept", "rank_share")}}
        for one in entry.objects("deltas")
    ]
    row: Row = {
        "name": entry.text("name"),
        "part": entry.text("part"),
        "layer": None if entry.missing("layer") else entry.count("layer"),
        "module": entry.text("module"),
        "reference": entry.text("reference"),
        "tensors": entry.count("tensors"),
        "entries": entry.count("entries"),
        "conflict": entry.number_or_none("conflict") if pairs else None,
        "conflict_mass": entry.number_or_none("conflict_mass") if pairs else None,
        "deltas": deltas,
    }
    return row | {name: _mean(pair.number_or_none(name) for pair in pairs) for name in _PAIRED}


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _short(row: Row) -> list[Any]:
    return [row[name] for name in ("name", "entries", "cosine", "conflict", "conflict_mass", "common", "left", "right")]


def _charts(places: Sequence[Row]) -> list[Chart]:
    """The text tower's layers; a chart for each reference, for deltas from the base and from the template differ."""
    charts = []
    layered = sorted((row for row in places if row["layer"] is not None), key=lambda row: str(row["reference"]))
    for reference, group in groupby(layered, key=lambda row: row["reference"]):
        rows = list(group)
        charts += _of_reference(rows, "" if reference == "base" else " (deltas from the template)")
    return charts


def _of_reference(rows: Sequence[Row], more: str) -> list[Chart]:
    layers = sorted({row["layer"] for row in rows})
    held = {row["module"] for row in rows}
    modules = [module for module in MODULES if module in held] + sorted(held - set(MODULES))
    by_place: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        by_place.setdefault((row["layer"], row["module"]), []).append(row)
    measures = []
    for name, title, about, diverging in _MEASURES:
        values = [[_mean(row[name] for row in by_place.get((layer, one), ())) for layer in layers] for one in modules]
        if any(value is not None for line in values for value in line):
            measures.append(measure(title, about, values, diverging=diverging))
    charts = []
    if measures:
        charts.append(heat(f"Overlap by layer and module{more}", ("layer", layers), ("module", modules), measures))
    models = list(dict.fromkeys(delta["model"] for row in rows for delta in row["deltas"]))
    series = [{"name": model, "values": [_norm(rows, layer, model) for layer in layers]} for model in models]
    if len(layers) > 1:
        charts.append(lines(f"Norms of the deltas{more}", ("layer", layers), "Frobenius norm of a layer", series))
    return charts


def _norm(rows: Sequence[Row], layer: int, model: str) -> float | None:
    found = [
        delta["norm"]
        for row in rows
        for delta in row["deltas"]
        if row["layer"] == layer and delta["model"] == model and delta["norm"] is not None
    ]
    return sqrt(sum(norm * norm for norm in found)) if found else None
