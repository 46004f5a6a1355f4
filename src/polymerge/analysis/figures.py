"""The figures of an overlap: for one tensor, for all tensors of a place, and as a table."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from polymerge.analysis.overlap_plots import overlap_chart, with_means
from polymerge.analysis.places import Place
from polymerge.analysis.signs import Sums, added
from polymerge.analysis.spectrum import Spectrum, shared_share
from polymerge.charts import stacked
from polymerge.durable import write_file
from polymerge.paths import given_path
from polymerge.tables import Table

if TYPE_CHECKING:
    import altair as alt

__all__ = [
    "DeltaFigures",
    "Measured",
    "Overlap",
    "PairFigures",
    "Reference",
    "Row",
    "Shape",
    "describe_overlap",
    "row_of",
    "spectra_of",
]

Reference = Literal["base", "template"]
"""What deltas are differences from."""

Shape = tuple[int, ...]

_HEAD: Final = (
    "where", "module", "entries", "norms", "cosine", "conflict", "by mass", "kept", "common", "eff. rank", "left",
    "right",
)  # fmt: skip


@dataclass(frozen=True)
class DeltaFigures:
    """The figures of one delta.

    norm           Frobenius norm
    kept           share of the squared norm that the kept entries hold; None for a delta of zero
    effective_rank exp of the entropy of the normalised singular values; for several tensors the mean; None if no
                   tensor is a matrix, the delta is zero, or singular values were not requested
    rank_share     the same divided by the shorter side of the matrix, in (0, 1]
    """

    model: str
    norm: float
    kept: float | None
    effective_rank: float | None
    rank_share: float | None


@dataclass(frozen=True)
class PairFigures:
    """The figures of two deltas. Shares of nothing, and the cosine of a zero delta, are None.

    cosine        of the two as vectors
    met           share of all entries at which both are nonzero
    conflict      share of those at which their signs differ
    conflict_mass share of the two deltas' mass (sum of magnitudes) that cancels when they are added up:
                  2 * sum of min(|a|, |b|) where signs differ, over sum of |a| + |b|
    common        share of the entries kept by either that both keep (Jaccard)
    kept_conflict share of the entries kept by both at which their signs differ
    left, right   mean squared cosine of the principal angles between the spaces of the largest left, and right,
                  singular vectors; for several tensors the mean
    """

    one: str
    other: str
    cosine: float | None
    met: float
    conflict: float | None
    conflict_mass: float | None
    common: float | None
    kept_conflict: float | None
    left: float | None
    right: float | None


@dataclass(frozen=True)
class Row:
    """The figures of one tensor, or of the tensors of one place together.

    name           canonical name of a tensor; empty for several
    part, layer, module   its place; for all tensors together part and module are `all`
    reference      base: deltas are model - base. template: models are merged without a base, so the deltas are model -
                   template, without the template itself, whose delta is zero
    tensors        number of tensors; `entries` per model; `shape` of a tensor
    met            share of the entries at which at least two deltas are nonzero
    conflict       share of those at which deltas of both signs occur; None if there are none
    conflict_mass  share of all mass that cancels when all deltas are summed with equal weights: 2 * sum of the
                   smaller of the positive and the negative mass of each entry, over the sum of all magnitudes
    """

    name: str
    part: str
    layer: int | None
    module: str
    reference: Reference
    tensors: int
    entries: int
    shape: Shape | None
    met: float
    conflict: float | None
    conflict_mass: float | None
    deltas: tuple[DeltaFigures, ...]
    pairs: tuple[PairFigures, ...]


@dataclass(frozen=True)
class Overlap(Table):
    """The overlap of the deltas of one plan.

    plan_hash  the plan's hash
    density    share of the entries of each tensor that count as kept
    rank       number of singular directions compared; None if singular values were not requested
    tensors    a row for each canonical tensor, or module of adapters, in the plan's order
    places     a row for each layer and module of the text tower, and for each module of other parts
    totals     a row for everything; one for each reference and set of models if there are several
    notes      remarks on the numbers
    """

    plan_hash: str
    density: float
    rank: int | None
    tensors: tuple[Row, ...]
    places: tuple[Row, ...]
    totals: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """One row per place: shares, the norm of each delta, the cosine of each two."""
        return [
            {
                **{
                    name: getattr(row, name) for name in ("part", "layer", "module", "met", "conflict", "conflict_mass")
                },
                **{f"norm {delta.model}": delta.norm for delta in row.deltas},
                **{f"cosine {pair.one}, {pair.other}": pair.cosine for pair in row.pairs},
            }
            for row in self.places
        ]

    def to_json(self) -> dict[str, Any]:
        """As JSON data; undefined numbers are null."""
        return asdict(self)

    def plot(self, measure: str = "sign_conflict") -> alt.VConcatChart:
        """Draw a measure over layers and modules, or the norms of the deltas by layer, as a chart of altair's.

        measure  conflict_mass, sign_conflict, cosine, common, left, right, or norms

        raises RecipeError for another measure, and where no layer has it; MissingExtraError without altair or
        vl-convert.
        """
        return stacked(overlap_chart([with_means(asdict(row)) for row in self.places], measure))

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Write it to a JSON file, which `report` shows, and return the file; raises OutputError where it cannot be."""
        return write_file(given_path(file), json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")


class Spectra(NamedTuple):
    """Spectral figures of one tensor: (effective rank, its share) of each delta, (left, right) of each pair."""

    ranks: tuple[tuple[float, float] | None, ...]
    spaces: tuple[tuple[float, float] | None, ...]


class Measured(NamedTuple):
    """All measurements of one tensor, in a form that can be summed."""

    name: str
    place: Place
    reference: Reference
    models: tuple[str, ...]
    shape: Shape
    sums: Sums
    spectra: Spectra | None


def spectra_of(shape: Shape, found: Sequence[Spectrum | None]) -> Spectra:
    """The figures of a matrix [out, in] whose deltas have these spectra."""
    return Spectra(
        tuple(one and (one.effective, one.effective / min(shape)) for one in found),
        tuple(
            (shared_share(one.left, other.left), shared_share(one.right, other.right)) if one and other else None
            for one, other in combinations(found, 2)
        ),
    )


def row_of(measured: Sequence[Measured], place: Place, name: str = "") -> Row:
    """The figures of several tensors together, which have the same models and reference."""
    first, sums = measured[0], added([one.sums for one in measured])
    spectra = [one.spectra for one in measured if one.spectra is not None]
    deltas = [
        DeltaFigures(
            model,
            sqrt(sums.dots[place_of_model, place_of_model]),
            _share(sums.kept_power[place_of_model], sums.power[place_of_model]),
            *_means([one.ranks[place_of_model] for one in spectra]),
        )
        for place_of_model, model in enumerate(first.models)
    ]
    return Row(
        name, *place, first.reference, len(measured), sums.entries, first.shape if name else None,
        sums.any_met / sums.entries,
        _share(sums.any_opposed, sums.any_met),
        _share(2 * sums.any_cancelled, sums.mass.sum()),
        tuple(deltas),
        tuple(_pairs(first.models, sums, spectra)),
    )  # fmt: skip


def _pairs(models: Sequence[str], sums: Sums, spectra: Sequence[Spectra]) -> Iterator[PairFigures]:
    for number, (i, j) in enumerate(combinations(range(len(models)), 2)):
        product = sqrt(sums.dots[i, i]) * sqrt(sums.dots[j, j])
        both = int(sums.common[i, j])
        yield PairFigures(
            models[i],
            models[j],
            min(max(float(sums.dots[i, j]) / product, -1.0), 1.0) if product else None,
            int(sums.met[i, j]) / sums.entries,
            _share(sums.opposed[i, j], sums.met[i, j]),
            _share(2 * sums.cancelled[i, j], sums.mass[i] + sums.mass[j]),
            _share(both, int(sums.kept[i] + sums.kept[j]) - both),
            _share(sums.common_opposed[i, j], both),
            *_means([one.spaces[number] for one in spectra]),
        )


def _share(part: float, whole: float) -> float | None:
    return min(float(part) / float(whole), 1.0) if whole else None


def _means(pairs: Sequence[tuple[float, float] | None]) -> tuple[float | None, float | None]:
    there = [pair for pair in pairs if pair is not None]
    if not there:
        return None, None
    return sum(one for one, _ in there) / len(there), sum(other for _, other in there) / len(there)


def describe_overlap(found: Overlap, *, by_conflict: bool = False) -> str:
    """Format one line per layer and module with the deltas' figures, the totals, and an explanation of the columns.

    by_conflict  sort by the share of mass that cancels, largest first, instead of by layer
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
    """One number per model, or minimum and maximum if there are many."""
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    if len(values) > 4:
        return f"{min(there):{form}} to {max(there):{form}}"
    return ", ".join("-" if value is None else f"{value:{form}}" for value in values)
