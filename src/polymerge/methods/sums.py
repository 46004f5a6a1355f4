"""Weighted sums of models, deltas and adapters; weights are given, or follow from norms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from polymerge.methods.kernels import AnyBlock, add_scaled, gram_of, rounded, weighted_sum
from polymerge.methods.lora import Factors, check_shapes, stack
from polymerge.methods.weights import PerModel, shares

__all__ = ["cat", "linear", "metagpt", "svd", "task_arithmetic"]


def linear(models: AnyBlock, weight: PerModel, normalize: bool = True, *, stepwise: str | None = None) -> AnyBlock:
    """Average the models with weights.

    Wortsman et al. 2022, arXiv:2203.05482 (model soups). With two weights that add up to one it is the merge of Bring
    Reason to Vision (Chen et al. 2025, arXiv:2505.05464) and equation 1 of AdaMMS (Du et al. 2025, arXiv:2503.23733).
    Their scripts compute in half precision and round after every product and sum; here the sum is taken in the working
    dtype. Weights are normalised in float64 and rounded once.

    models     [model, n]  float32 or float64
    weight     [model]     each model's coefficient, of either sign
    normalize  divide the weights by their sum
    stepwise   a dtype that every product and every sum is rounded to, as code that computes in it does; None for the
               working dtype
    returns    [n]
    raises     RecipeError where `weight` is not one number per model, or adds up to 0 and is to be normalised
    """
    weights = shares(weight, len(models), normalize)
    if stepwise is None:
        return weighted_sum(models, weights)
    parts = [rounded(weighted_sum(models[n : n + 1], [share]), stepwise) for n, share in enumerate(weights)]
    total = parts[0]
    for part in parts[1:]:
        total = rounded(add_scaled(total, part, 1.0), stepwise)
    return total


def task_arithmetic(deltas: AnyBlock, weight: PerModel, normalize: bool = False) -> AnyBlock:
    """Sum the weighted deltas.

    Ilharco et al. 2023, arXiv:2212.04089, section 2. The mean that AdaMMS calls `average` has weights of 1/T.

    deltas     [model, n]  task vectors, float32 or float64
    weight     [model]     each model's coefficient, of either sign
    normalize  divide the weights by their sum
    returns    [n]         the merged delta
    raises     RecipeError where `weight` is not one number per model, or adds up to 0 and is to be normalised
    """
    return weighted_sum(deltas, shares(weight, len(deltas), normalize))


def metagpt(deltas: AnyBlock, *, gram: NDArray[np.float64] | None = None) -> AnyBlock:
    """Sum the deltas, each weighted by its share of the total squared norm.

    Zhou et al. 2024, arXiv:2406.11385: the weight of model t is |delta_t|^2 / sum_k |delta_k|^2, with norms over the
    whole model. AdaMMS compares with it, and its code takes the norms in the checkpoint's own precision, where
    those of half-precision models overflow to NaN; here they are sums in float64. Where no model differs from the base
    all weights are zero.

    deltas   [model, n]  float32 or float64
    gram     [model, model]  dot products of the whole models' deltas; else those of `deltas`
    returns  [n]         the merged delta
    """
    squares = np.diagonal(gram_of(deltas) if gram is None else gram)
    total = float(squares.sum())
    return weighted_sum(deltas, [float(square) / total if total > 0 else 0.0 for square in squares])


def cat(pairs: Sequence[Factors], weight: PerModel, normalize: bool = False) -> Factors:
    """Sum weighted adapters exactly by concatenating their factors.

    What PEFT calls `cat`: the update is the weighted sum of the updates, without the cross terms that come from adding
    up the factors themselves. Here the whole weight is on `b`, and `a` is unchanged.

    pairs      updates of one shape [out, in], of any ranks
    weight     [model]  each model's coefficient, of either sign
    normalize  divide the weights by their sum
    returns    factors whose rank is the sum of the ranks
    raises     RecipeError where shapes differ, `weight` is not one number per model, or adds up to 0 and is to be
               normalised
    """
    check_shapes(pairs)
    return stack(pairs, shares(weight, len(pairs), normalize))


def svd(pairs: Sequence[Factors], weight: PerModel, normalize: bool = False) -> Factors:
    """Sum weighted adapters, to be reduced to a rank afterwards with `truncate`.

    What PEFT calls `svd`: the best approximation of the weighted sum that has the wanted rank (Eckart and Young 1936).
    The sum is that of `cat`, with the same parameters and errors; PEFT multiplies it out, here it stays in factors.
    """
    return cat(pairs, weight, normalize)
