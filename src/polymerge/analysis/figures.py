"""The numbers of an overlap: of one tensor, or of all tensors of one place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt
from typing import Literal, NamedTuple

from polymerge.analysis.places import Place
from polymerge.analysis.signs import Sums, added
from polymerge.analysis.spectrum import Spectrum, shared_share

__all__ = ["DeltaFigures", "Measured", "PairFigures", "Reference", "Row", "Shape", "Spectra", "row_of", "spectra_of"]

Reference = Literal["base", "template"]
"""What a delta is a difference from."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class DeltaFigures:
    """One delta.

    norm           Frobenius norm
    kept           share of the squared norm that the kept entries hold; None for a delta of zero
    effective_rank exp of the entropy of the normalised singular values; of several tensors the mean; None where no
                   tensor is a matrix, the delta is zero, or singular values were not asked for
    rank_share     the same over the shorter side of the matrix, in (0, 1]
    """

    model: str
    norm: float
    kept: float | None
    effective_rank: float | None
    rank_share: float | None


@dataclass(frozen=True)
class PairFigures:
    """Two deltas. A share of nothing, and the cosine of a delta of zero, is None.

    cosine        of the two as vectors
    met           share of all entries at which neither is zero
    conflict      share of those at which their signs differ
    conflict_mass share of the two deltas' mass (sum of magnitudes) that cancels when they are added up:
                  2 * sum of min(|a|, |b|) where signs differ, over sum of |a| + |b|
    common        of the entries that either keeps, the share that both keep (Jaccard)
    kept_conflict share of the entries that both keep at which their signs differ
    left, right   mean squared cosine of the principal angles between the spaces of the largest left, and right,
                  singular vectors; of several tensors the mean
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
    """What is found for one tensor, or for the tensors of one place together.

    name           canonical name of a tensor; empty for several
    part, layer, module   where it belongs; of all tensors together the part is `all`, the module too
    reference      base: deltas are model - base. template: models are merged without a base, so the deltas are model -
                   template, and the template, whose own is zero, is none of them
    tensors        how many; `entries` of one model; `shape` of a tensor
    met            share of the entries at which at least two deltas are not zero
    conflict       share of those at which some delta is positive and some negative; None where there are none
    conflict_mass  share of all mass that cancels when all deltas are added up with equal weights: 2 * sum of the
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


class Spectra(NamedTuple):
    """What singular values say of one tensor: (effective rank, its share) of each delta, (left, right) of each pair."""

    ranks: tuple[tuple[float, float] | None, ...]
    spaces: tuple[tuple[float, float] | None, ...]


class Measured(NamedTuple):
    """Everything that is found in one tensor, in a form that can be added up."""

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
    """The figures of some tensors together, which are of the same models and have the same reference."""
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
