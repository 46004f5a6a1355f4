"""An overlap for people: a table with a line for each place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from polymerge.analysis.figures import Row
from polymerge.analysis.overlap import Overlap

__all__ = ["describe_overlap"]

_HEAD: Final = (
    "where", "module", "entries", "norms", "cosine", "conflict", "by mass", "kept", "common", "eff. rank", "left",
    "right",
)  # fmt: skip


def describe_overlap(found: Overlap, *, by_conflict: bool = False) -> str:
    """A line for each layer and module with the deltas' figures, everything together, and what the columns say.

    by_conflict  the lines with the largest share of mass that cancels first, instead of the layers' order
    """
    places = list(found.places)
    if by_conflict:
        places.sort(key=lambda row: -1.0 if row.conflict_mass is None else row.conflict_mass, reverse=True)
    rows = [_HEAD, *(_cells(row) for row in (*places, *found.totals))]
    if found.rank is None:
        rows = [row[:-3] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    models = list(dict.fromkeys(delta.model for row in found.totals for delta in row.deltas))
    return "\n".join([f"deltas, in this order: {', '.join(models)}", "", *lines, "", *_legend(found)])


def _legend(found: Overlap) -> list[str]:
    chance = found.density / (2 - found.density)
    lines = [
        "conflict: share of the entries changed by two or more at which signs differ; by mass: share of the deltas'",
        "mass that cancels when they are added up. cosine, common, left and right: means over all pairs of models.",
        f"kept: share of a delta's squared norm in the largest {found.density:g} of its entries; common: of the",
        f"entries that either of two keeps, the share that both keep ({chance:.2f} by chance).",
    ]
    if found.rank is not None:
        lines += [
            "eff. rank: share of the directions of a matrix that a delta uses; left, right: how much two deltas share",
            f"of the spaces of their {found.rank} largest singular vectors.",
        ]
    return [*lines, *(f"note: {note}" for note in found.notes)]


def _cells(row: Row) -> tuple[str, ...]:
    where = row.part if row.layer is None else f"{row.part} {row.layer}"
    if row.reference == "template":
        where += " (from template)"
    return (
        where,
        row.module,
        f"{row.entries:,}",
        _each([delta.norm for delta in row.deltas], ".3g"),
        _mean([pair.cosine for pair in row.pairs]),
        _number(row.conflict) if row.pairs else "-",
        _number(row.conflict_mass) if row.pairs else "-",
        _each([delta.kept for delta in row.deltas], ".2f"),
        _mean([pair.common for pair in row.pairs]),
        _each([delta.rank_share for delta in row.deltas], ".2f"),
        _mean([pair.left for pair in row.pairs]),
        _mean([pair.right for pair in row.pairs]),
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _mean(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    return _number(sum(there) / len(there)) if there else "-"


def _each(values: Sequence[float | None], form: str) -> str:
    """One number for each model, or from the smallest to the largest where they are many."""
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    if len(values) > 4:
        return f"{min(there):{form}} to {max(there):{form}}"
    return ", ".join("-" if value is None else f"{value:{form}}" for value in values)
