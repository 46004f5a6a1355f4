"""DELLA: drop entries at random, small ones with a greater chance than large ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import fsum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from polymerge.errors import RecipeError
from polymerge.methods.kernels import AnyBlock, elected_sum, keep_ranked, magnitudes, weighted_sum
from polymerge.methods.table import out_of_range
from polymerge.methods.ties import Elect, Normalize, check_words
from polymerge.methods.weights import PerModel, per_model, shares

__all__ = ["Norms", "della", "della_linear", "norms", "rescaling_of", "spread"]

Norms: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]
"""The L1 norms of rows of the models' deltas, and of what is kept of them, [row, model] each."""

TINY = 1e-7
"""L1 norm below which a delta is not rescaled."""


def della_linear(
    deltas: AnyBlock,
    weight: PerModel,
    density: PerModel = 1.0,
    epsilon: PerModel = 0.15,
    rescale: bool = True,
    normalize: bool = False,
    *,
    rescaling: Sequence[float] | None = None,
    width: int | None = None,
    keys: Sequence[int],
    start: int = 0,
) -> AnyBlock:
    """Drop entries of each delta at random, small ones rather than large ones, rescale the rest, and sum.

    Deep et al. 2024, arXiv:2406.11617 (DELLA), section 3.1, as in mergekit: the chance of an entry to be kept rises
    with the rank of its magnitude in its row, from density - epsilon to density + epsilon, and what is kept of a tensor
    is scaled to the L1 norm of the whole. (The paper divides each entry by its chance.) Entries of equal magnitude
    share the mean of their ranks, where mergekit leaves their order to the sort. A tensor of one dimension is one row.
    Draws are those of `polymerge.methods.dare`, one word per element.

    deltas     [model, n]  task vectors, float32 or float64; overwritten by the thinned ones
    weight     [model]     each model's coefficient, of either sign
    density    [model]     mean chance of an entry to be kept, in [0, 1]; one number stands for all models. At 0 nothing
                           is kept, at 1 all is, whatever `epsilon`; else density - epsilon and density + epsilon have
                           to lie between 0 and 1
    epsilon    [model]     what the chance of the smallest and the largest differs by from the density
    rescale    whether to scale what is kept to the L1 norm of the whole; not where either norm is below 1e-7
    normalize  divide the weights by their sum
    rescaling  [model]     the factors, if `deltas` is a block of a larger tensor
    width      entries of each row; None for a single row
    keys       [model]     64-bit integers; draws with different keys are independent
    start      flat index of the block's first element
    returns    [n]         the merged delta
    raises     RecipeError where a parameter is not one number per model or out of range, or the weights add up to 0 and
               are to be normalised
    """
    weights = shares(weight, len(deltas), normalize)
    return weighted_sum(_thinned(deltas, density, epsilon, rescale, rescaling, width, keys, start), weights)


def della(
    deltas: AnyBlock,
    weight: PerModel,
    density: PerModel = 1.0,
    epsilon: PerModel = 0.15,
    rescale: bool = True,
    elect: Elect = "weighted",
    normalize: Normalize = "weight",
    *,
    rescaling: Sequence[float] | None = None,
    width: int | None = None,
    keys: Sequence[int],
    start: int = 0,
) -> AnyBlock:
    """Drop entries of each delta at random, small ones rather than large ones, rescale, elect signs, average.

    Deep et al. 2024, arXiv:2406.11617 (DELLA), section 3, as in mergekit: what `della_linear` keeps, and the election
    of `polymerge.methods.ties.ties`, whose parameters `elect` and `normalize` are; the others are those of
    `della_linear`. The defaults are mergekit's.
    """
    check_words(elect, normalize)
    weights = shares(weight, len(deltas), normalize=False)
    thinned = _thinned(deltas, density, epsilon, rescale, rescaling, width, keys, start)
    return elected_sum(thinned, weights, elect, normalize)


def spread(density: PerModel, epsilon: PerModel, models: int) -> tuple[list[float], list[float]]:
    """Each model's mean chance, and what its smallest and largest differ from it by: nothing where all or none is kept.

    raises RecipeError for a chance out of range
    """
    means, away = per_model(density, models, "density", 0.0, 1.0), per_model(epsilon, models, "epsilon", 0.0)
    for mean, one in zip(means, away, strict=True):
        if (problem := out_of_range(mean, one)) is not None:
            raise RecipeError(problem)
    return means, [0.0 if mean in (0, 1) else one for mean, one in zip(means, away, strict=True)]


def norms(
    deltas: AnyBlock, width: int, keys: Sequence[int], start: int, density: Sequence[float], epsilon: Sequence[float]
) -> Norms:
    """The L1 norms of the rows of a block, and of what is kept of them; `deltas` are overwritten."""
    whole = magnitudes(deltas, width)
    return whole, magnitudes(keep_ranked(deltas, width, keys, start, density, epsilon, [1.0] * len(keys)), width)


def rescaling_of(blocks: Iterable[Norms]) -> list[float]:
    """The factor of each model, from the norms of all rows of a tensor; their sums are exact."""
    whole, kept = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    sums = [(fsum(one), fsum(other)) for one, other in zip(whole.T, kept.T, strict=True)]
    return [one / other if min(one, other) >= TINY else 1.0 for one, other in sums]


def _thinned(
    deltas: AnyBlock,
    density: PerModel,
    epsilon: PerModel,
    rescale: bool,
    rescaling: Sequence[float] | None,
    width: int | None,
    keys: Sequence[int],
    start: int,
) -> AnyBlock:
    models, n = deltas.shape
    if len(keys) != models:
        raise RecipeError(f"keys: {len(keys)} for {models} models. Give one per model")
    means, away = spread(density, epsilon, models)
    width = width or n
    if rescaling is None:
        own = deltas.copy() if isinstance(deltas, np.ndarray) else deltas.clone()
        rescaling = rescaling_of([norms(own, width, keys, start, means, away)]) if rescale and n else [1.0] * models
    return keep_ranked(deltas, width, keys, start, means, away, rescaling)
