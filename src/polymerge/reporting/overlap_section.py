"""The page's overlap section: the charts of an overlap, and a table of all tensors."""

from __future__ import annotations

from typing import Annotated, Any, Final

from msgspec import Meta, Struct, to_builtins

from polymerge.analysis.overlap_plots import overlap_charts, with_means
from polymerge.charts import figure
from polymerge.reporting.records import Count, Number, Source

__all__ = ["UNRELATED", "overlap_section"]

UNRELATED: Final = 0.29
"""Share of mass that cancels between two independent normal deltas of equal scale: 1 - 1/sqrt(2)."""

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
        [with_means(to_builtins(one)) for one in all_of] for all_of in (record.places, record.totals, record.tensors)
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
        "charts": [figure(charts) for charts in overlap_charts(places)],
    }
