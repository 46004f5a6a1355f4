"""DARE: drop and rescale."""

from __future__ import annotations

from collections.abc import Sequence

from polymerge.errors import RecipeError
from polymerge.methods.kernels import AnyBlock, elected_sum, keep_random, weighted_sum
from polymerge.methods.ties import Elect, Normalize, check_words
from polymerge.methods.weights import PerModel, per_model, shares

__all__ = ["dare_linear", "dare_ties"]


def dare_linear(
    deltas: AnyBlock,
    weight: PerModel,
    density: PerModel = 1.0,
    rescale: bool = True,
    normalize: bool = False,
    *,
    keys: Sequence[int],
    start: int = 0,
) -> AnyBlock:
    """Drop entries of each delta at random, rescale the rest, and sum the weighted deltas.

    Yu et al. 2024, arXiv:2311.03099, section 3: entries are kept with probability `density` and divided by it, so that
    the expectation is unchanged. Bring Reason to Vision discards the quotient that it computes (`rescale=False`). Draws
    come from a counter-based generator, one word per element (see `polymerge.methods.kernels.keep_random`), so they
    depend only on the key and the element's index; division is done as multiplication by 1 / density.

    deltas     [model, n]  task vectors, float32 or float64; overwritten by the thinned ones
    weight     [model]     each model's coefficient, of either sign
    density    [model]     chance of an entry to be kept, in [0, 1]; one number stands for all models
    rescale    multiply what is kept by 1 / density
    normalize  divide the weights by their sum
    keys       [model]     64-bit integers; draws with different keys are independent
    start      flat index of the block's first element
    returns    [n]         the merged delta
    raises     RecipeError where `weight`, `density` or `keys` is not one number per model, a density is out of range,
               or the weights add up to 0 and are to be normalised
    """
    weights = shares(weight, len(deltas), normalize)
    return weighted_sum(_thinned(deltas, density, rescale, keys, start), weights)


def dare_ties(
    deltas: AnyBlock,
    weight: PerModel,
    density: PerModel = 1.0,
    rescale: bool = True,
    elect: Elect = "weighted",
    normalize: Normalize = "none",
    *,
    keys: Sequence[int],
    start: int = 0,
) -> AnyBlock:
    """Drop entries of each delta at random, rescale the rest, elect a sign per entry, and average the agreeing entries.

    Yu et al. 2024, arXiv:2311.03099, section 3, in place of the trimming of TIES; the election is that of
    `polymerge.methods.ties.ties`. The defaults are mergekit's, which divides the sum only if asked to. Bring Reason to
    Vision's form is `rescale=False`, `elect="unweighted"`, `normalize="count"`.

    deltas     [model, n]  task vectors, float32 or float64; overwritten by the thinned ones
    weight     [model]     each model's coefficient, of either sign
    density    [model]     chance of an entry to be kept, in [0, 1]; one number stands for all models
    rescale    multiply what is kept by 1 / density
    elect      weighted: by the sum of weight * delta; unweighted: by the sum of deltas
    normalize  divide by the agreeing weights, by the count of those who agree, or by nothing
    keys       [model]     64-bit integers; draws with different keys are independent
    start      flat index of the block's first element
    returns    [n]         the merged delta
    raises     RecipeError where `weight`, `density` or `keys` is not one number per model, a density is out of range,
               or `elect` or `normalize` is another word
    """
    check_words(elect, normalize)
    weights = shares(weight, len(deltas), normalize=False)
    return elected_sum(_thinned(deltas, density, rescale, keys, start), weights, elect, normalize)


def _thinned(deltas: AnyBlock, density: PerModel, rescale: bool, keys: Sequence[int], start: int) -> AnyBlock:
    models = len(deltas)
    if len(keys) != models:
        raise RecipeError(f"keys: {len(keys)} for {models} models. Give one per model")
    return keep_random(deltas, keys, start, per_model(density, models, "density", 0.0, 1.0), rescale)
