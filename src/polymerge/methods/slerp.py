"""Interpolation along the arc between two models."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from polymerge.errors import RecipeError
from polymerge.methods.kernels import AnyBlock, gram_of, weighted_sum

__all__ = ["arc_weights", "slerp"]

NEARLY_PARALLEL = 0.9995
NO_DIRECTION = 1e-8
"""A norm up to which a tensor points nowhere."""


def slerp(models: AnyBlock, t: float, *, gram: NDArray[np.float64] | None = None) -> AnyBlock:
    """Interpolate two tensors along the arc between their directions, from the first at t = 0 to the second at t = 1.

    Shoemake 1985, "Animating rotation with quaternion curves", section 3.3, with a tensor, flattened, as the vector.
    The angle is that between the two tensors, the coefficients act on the tensors as they are, not on unit vectors, so
    norms are interpolated along. That is also what mergekit's slerp does, with the same bound for nearly parallel
    tensors (|cosine| above 0.9995), between which it is a straight line, and the same rule for one that has no
    direction (a norm of at most 1e-8): it counts as orthogonal to the other. Angle and coefficients are computed in
    float64.

    models   [2, n]   float32 or float64
    t        in [0, 1]
    gram     [2, 2]   the whole tensors' dot products, where `models` is a block of them; else taken from `models`
    returns  [n]
    raises   RecipeError for any other number of models, or t out of range
    """
    if len(models) != 2:
        raise RecipeError(f"slerp: takes two models, got {len(models)}")
    return weighted_sum(models, arc_weights(gram_of(models) if gram is None else gram, t))


def arc_weights(gram: NDArray[np.float64], t: float) -> tuple[float, float]:
    """The two tensors' coefficients at `t`, from their dot products [2, 2]."""
    if not 0 <= t <= 1:
        raise RecipeError(f"t: {t} is not in [0, 1]")
    # one square root after the other: their product cannot overflow where that of the squares would
    norms = [math.sqrt(gram[place, place]) for place in range(2)]
    cosine = float(gram[0, 1]) / (norms[0] * norms[1]) if min(norms) > NO_DIRECTION else 0.0
    if abs(cosine) > NEARLY_PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
