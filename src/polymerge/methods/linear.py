"""Weighted averages of models."""

from __future__ import annotations

from polymerge.methods.kernels import AnyBlock, add_scaled, rounded, weighted_sum
from polymerge.methods.weights import PerModel, shares

__all__ = ["linear"]


def linear(models: AnyBlock, weight: PerModel, normalize: bool = True, *, stepwise: str | None = None) -> AnyBlock:
    """Average the models, each with its weight.

    Wortsman et al. 2022, arXiv:2203.05482 (model soups). With two weights that add up to one it is the merge of Bring
    Reason to Vision (Chen et al. 2025, arXiv:2505.05464) and equation 1 of AdaMMS (Du et al. 2025, arXiv:2503.23733).
    Their scripts compute in half precision and round after every product and sum; here the sum is taken in the working
    dtype. Weights are normalised in float64 and rounded once.

    models     [model, n]  float32 or float64
    weight     [model]     each model's say, of either sign
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
