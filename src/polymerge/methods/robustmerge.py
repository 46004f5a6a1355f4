"""RobustMerge: prune adapters, rescale the remaining entries of each rank, balance the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from polymerge.errors import RecipeError
from polymerge.methods.lora import Factors, Wide, check_shapes, narrow
from polymerge.methods.weights import per_model

__all__ = ["Compose", "robustmerge"]

Compose = Literal["factors", "product"]


def robustmerge(
    pairs: Sequence[Factors],
    density: float = 0.2,
    scale: float = 2.0,
    floor: float | None = 0.8,
    compose: Compose = "factors",
) -> Factors:
    """Prune the small entries of both factors, rescale each rank to compensate, and sum the adapters.

    Zeng et al. 2025, arXiv:2502.17159 (NeurIPS 2025), equations 2 to 5 and algorithm 1. With A~ and B~ for what pruning
    leaves of a task's factors, rank row i of A has the scale S_i = sum_j |A_ij| / sum_j |A~_ij|, and S~ is S divided by
    its sum over the tasks. The paper adds up scale * B~ diag(S~) A~ (`compose="product"`, `floor=None`). Its released
    code, which the defaults follow, adds up the factors apart, so that every task's B meets every task's A:
    (scale * sum of B~ diag(S~)) (scale * sum of A~), `scale` once in each; and it lifts the smaller S of a task to the
    one at place `int(r * floor)` of their ascending order, so that only the largest scales differ.

    As released, the threshold is the `int(n * (1 - density))`-th smallest magnitude of the n entries of a factor, and
    what is equal to it stays: at least one entry more than density * n. The same entries are dropped whatever `floor`
    and `compose` are. Where the code divides by zero, here a row of A that is zero has the scale 1, and a row of which
    pruning leaves nothing has the largest scale of its task's other rows; a rank that is dead in all tasks adds
    nothing. S is taken in float64 (by the code in the adapters' dtype), and all is rounded once.

    pairs    [model]  updates of one shape [out, in] and of one rank r: S~ balances the tasks rank by rank
    density  share of entries kept in each factor, in [0, 1]; 0 keeps the largest alone, and its equals
    scale    multiplies the merged update, and in "factors" each of its factors; finite
    floor    place among a task's scales, in [0, 1], below which they are lifted; None lifts nothing
    compose  factors: rank r, as released; product: the paper's sum of products, rank T * r
    returns  the merged factors, float32
    raises   RecipeError where there are no pairs, shapes or ranks differ, a number is out of range, or `compose` is
             another word
    """
    if compose not in get_args(Compose):
        raise RecipeError(f"compose: '{compose}' is not one of {', '.join(get_args(Compose))}")
    per_model(density, 1, "density", 0.0, 1.0)
    per_model(1.0 if floor is None else floor, 1, "floor", 0.0, 1.0)
    if not np.isfinite(scale):
        raise RecipeError(f"scale: {scale} is not finite")
    check_shapes(pairs)
    for place, pair in enumerate(pairs):
        if pair.rank != pairs[0].rank:
            raise RecipeError(
                f"adapter {place}: has rank {pair.rank}, adapter 0 has rank {pairs[0].rank}; robustmerge balances the "
                "adapters rank by rank. Use adapters of one rank, or a method that takes any, such as svd"
            )
    a = [pair.a.astype(np.float64) for pair in pairs]
    left = [_pruned(pair.b.astype(np.float64), density) for pair in pairs]
    right = [_pruned(x, density) for x in a]
    scales = np.stack([_scales(*rows, floor) for rows in zip(a, right, strict=True)])
    balanced = [b * share for b, share in zip(left, scales / scales.sum(axis=0), strict=True)]
    if compose == "factors":
        return Factors(narrow(scale * np.sum(balanced, axis=0)), narrow(scale * np.sum(right, axis=0)))
    return Factors(narrow(scale * np.concatenate(balanced, axis=1)), narrow(np.concatenate(right)))


def _pruned(x: Wide, density: float) -> Wide:
    """Keep the entries that reach the threshold, zero the rest."""
    place = int(x.size * (1 - density))
    if place == 0:
        return x
    sizes = np.abs(x)
    return np.where(sizes >= np.partition(sizes, place - 1, axis=None)[place - 1], x, 0.0)


def _scales(a: Wide, kept: Wide, floor: float | None) -> Wide:
    """The scale of each rank row that compensates for the pruned magnitude."""
    before, after = np.abs(a).sum(axis=1), np.abs(kept).sum(axis=1)
    scales: Wide = np.divide(before, after, out=np.ones_like(before), where=after > 0)
    scales[(after == 0) & (before > 0)] = scales.max()
    if floor is not None:
        scales = np.maximum(scales, np.sort(scales)[min(int(len(scales) * floor), len(scales) - 1)])
    return scales
