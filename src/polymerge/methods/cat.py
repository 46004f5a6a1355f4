"""Weighted sums of adapters."""

from __future__ import annotations

from collections.abc import Sequence

from polymerge.methods.factors import Factors, check_shapes, stack
from polymerge.methods.weights import PerModel, shares

__all__ = ["cat", "svd"]


def cat(pairs: Sequence[Factors], weight: PerModel, normalize: bool = False) -> Factors:
    """Add adapters up exactly, each times its weight, by putting their factors side by side.

    What PEFT calls `cat`: the update is the weighted sum of the updates, without the cross terms that come from adding
    up the factors themselves. Here the whole weight is on `b`, and `a` is unchanged.

    pairs      updates of one shape [out, in], of any ranks
    weight     [model]  each model's say, of either sign
    normalize  divide the weights by their sum
    returns    factors whose rank is the sum of the ranks
    raises     RecipeError where shapes differ, `weight` is not one number per model, or adds up to 0 and is to be
               normalised
    """
    check_shapes(pairs)
    return stack(pairs, shares(weight, len(pairs), normalize))


def svd(pairs: Sequence[Factors], weight: PerModel, normalize: bool = False) -> Factors:
    """Add adapters up, each times its weight, to be cut to a rank afterwards with `truncate`.

    What PEFT calls `svd`: the best approximation of the weighted sum that has the wanted rank (Eckart and Young 1936).
    The sum is that of `cat`, with the same parameters and errors; PEFT multiplies it out, here it stays in factors.
    """
    return cat(pairs, weight, normalize)
