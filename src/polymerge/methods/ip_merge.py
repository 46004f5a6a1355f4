"""IP-Merging: add to a multimodal model what of an LLM's delta lies along the multimodal model's own directions."""

from __future__ import annotations

import numpy as np

from polymerge.methods.decompositions import Matrix, add_up, components, dots_of_columns, multiply, tall
from polymerge.methods.weights import PerModel, per_model

__all__ = ["ip_merge"]

SHARPNESS = 32.0
"""Factor of the cosines in the softmax."""


def ip_merge(deltas: Matrix, weight: PerModel = 1.0, rank: int = 1024, threshold: float = 0.4) -> Matrix:
    """Keep the first model's delta, and add of each other's what lies along the first one's right singular vectors.

    IP-Merging, arXiv:2510.14387, as released: the `rank` largest components of the first delta (the multimodal model's)
    and of another (an LLM's) are paired in order. Unless the cosine of some pair of right vectors reaches
    `threshold`, nothing is added. Else the other's components, times the ratio of the sums of singular values, are
    projected on the first one's right vectors v_i, each by the square of w_i, where w = softmax(32 cosines). Where we
    differ: the cosine's magnitude counts, since singular vectors have no sign of their own (the code takes that which
    its SVD happens to return); the decomposition is exact, not drawn at random; the released recipe takes attention and
    MLP matrices only, which `exclude` can say.

    deltas     [model, m, n]  float32 or float64, finite; overwritten
    weight     [model]        each model's coefficient, of either sign
    rank       components of each model
    threshold  the least cosine, in [0, 1]
    returns    [m, n]         the merged delta, in the memory of the first one; for one model of weight 1 its delta
    raises     RecipeError where `weight` is not one number per model
    """
    weights = per_model(weight, len(deltas), "weight")
    stack = tall(deltas)
    target, standing = stack[0], stack is deltas
    first = components(target, rank)
    for other in stack[1:]:
        found = components(other, rank)
        pairs = min(len(first.s), len(found.s))
        if standing:
            shared = found.v.T @ first.v[:, :pairs]
        else:
            dots = dots_of_columns([other], [target])
            half = found.v.T @ dots
            del dots
            shared = half @ first.v[:, :pairs]
            del half
            shared /= found.s[:, None] * first.s[:pairs]
        cosines = np.abs(np.diagonal(shared))
        if not pairs or cosines.max() < threshold:
            other[...] = 0
            continue
        parts = np.exp(SHARPNESS * (cosines - cosines.max()))
        ratio = first.s.sum() / found.s.sum()
        shared *= ratio * (parts / parts.sum()) ** 2
        if standing:
            along = found.v @ shared
            multiply([other], along @ first.v[:, :pairs].T, other)
        else:
            shared *= found.s[:, None] / first.s[:pairs]
            along = found.v @ shared
            multiply([target], first.v[:, :pairs] @ along.T, other)
        del shared, along, found
    add_up(deltas, deltas[0], weights)
    merged: Matrix = deltas[0]
    return merged
