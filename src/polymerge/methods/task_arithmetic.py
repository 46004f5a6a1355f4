"""Weighted sums of task vectors."""

from __future__ import annotations

from polymerge.methods.kernels import AnyBlock, weighted_sum
from polymerge.methods.weights import PerModel, shares

__all__ = ["task_arithmetic"]


def task_arithmetic(deltas: AnyBlock, weight: PerModel, normalize: bool = False) -> AnyBlock:
    """Add up the deltas, each times its weight.

    Ilharco et al. 2023, arXiv:2212.04089, section 2. The mean that AdaMMS calls `average` has weights of 1/T.

    deltas     [model, n]  task vectors, float32 or float64
    weight     [model]     each model's say, of either sign
    normalize  divide the weights by their sum
    returns    [n]         the merged delta
    raises     RecipeError where `weight` is not one number per model, or adds up to 0 and is to be normalised
    """
    return weighted_sum(deltas, shares(weight, len(deltas), normalize))
