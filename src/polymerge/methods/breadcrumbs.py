"""Breadcrumbs: drop the largest entries of each delta as well as the smallest."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

from polymerge.methods.kernels import AnyBlock, elected_sum, find_cutoffs, keep_between, weighted_sum
from polymerge.methods.ties import Elect, Normalize, check_words
from polymerge.methods.weights import PerModel, per_model, shares

__all__ = ["Band", "Ranks", "breadcrumbs", "breadcrumbs_ties", "ranks"]


class Band(NamedTuple):
    """The magnitudes that a model keeps, both ends included."""

    low: float
    high: float


class Ranks(NamedTuple):
    """The ends of a model's band by rank, counted from the largest magnitude: those from `last` to `first` are kept.

    first  0 if nothing is dropped above
    """

    first: int
    last: int

    def band(self, low: float, high: float) -> Band:
        """The band between the magnitudes at these ranks; without a first one it is open."""
        return Band(low, high if self.first else inf)


def ranks(density: PerModel, gamma: PerModel, models: int, n: int) -> list[Ranks]:
    """The ranks of the magnitudes that each model keeps of `n`, as in mergekit: `int(gamma * n)` of the largest are
    dropped, and then as many of the smallest that `int(density * n)` are left, which comes first if both cannot be.
    """
    found = []
    pairs = zip(per_model(density, models, "density", 0.0, 1.0), per_model(gamma, models, "gamma", 0.0), strict=True)
    for share, outliers in pairs:
        stay = int(share * n) if share < 1 else n
        above = min(int(outliers * n), n - stay)
        found.append(Ranks(above + 1 if above and stay else 0, above + stay if stay else 0))
    return found


def breadcrumbs(
    deltas: AnyBlock,
    weight: PerModel,
    density: PerModel = 1.0,
    gamma: PerModel = 0.01,
    normalize: bool = False,
    *,
    band: Sequence[Band] | None = None,
) -> AnyBlock:
    """Drop the largest and the smallest entries of each delta, and sum the weighted deltas.

    Davari and Belilovsky 2023, arXiv:2312.06795, section 3: the outliers of a delta, and the many small entries, harm a
    merge. The shares are mergekit's. Where no entry is an outlier (`int(gamma * n)` is 0) mergekit drops the
    tensor's whole delta; here none is dropped above. Entries equal to an end of the band are kept.

    deltas     [model, n]  task vectors, float32 or float64; overwritten
    weight     [model]     each model's coefficient, of either sign
    density    [model]     share of entries kept, in [0, 1]; at 1 all are, whatever `gamma`
    gamma      [model]     share of entries dropped as outliers, below one half
    normalize  divide the weights by their sum
    band       [model]     the kept magnitudes if `deltas` is a block of a larger tensor
    returns    [n]         the merged delta
    raises     RecipeError where a parameter is not one number per model, or out of range
    """
    weights = shares(weight, len(deltas), normalize)
    return weighted_sum(_banded(deltas, density, gamma, band), weights)


def breadcrumbs_ties(
    deltas: AnyBlock,
    weight: PerModel,
    density: PerModel = 1.0,
    gamma: PerModel = 0.01,
    elect: Elect = "weighted",
    normalize: Normalize = "none",
    *,
    band: Sequence[Band] | None = None,
) -> AnyBlock:
    """Drop the largest and the smallest entries of each delta, elect a sign per entry, and sum what agrees.

    Davari and Belilovsky 2023 with the election of `polymerge.methods.ties.ties`, whose parameters `elect` and
    `normalize` are; the others are those of `breadcrumbs`. The defaults are mergekit's.
    """
    check_words(elect, normalize)
    weights = shares(weight, len(deltas), normalize=False)
    return elected_sum(_banded(deltas, density, gamma, band), weights, elect, normalize)


def _banded(deltas: AnyBlock, density: PerModel, gamma: PerModel, band: Sequence[Band] | None) -> AnyBlock:
    models, n = deltas.shape
    if band is None:
        wanted = ranks(density, gamma, models, n)
        lows = find_cutoffs(deltas, [one.last for one in wanted])
        highs = find_cutoffs(deltas, [one.first for one in wanted])
        band = [one.band(low, high) for one, low, high in zip(wanted, lows, highs, strict=True)]
    return keep_between(deltas, [one.low for one in band], [one.high for one in band])
