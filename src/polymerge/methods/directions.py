"""Weighted sums whose weights follow from the angles between models, or between their deltas.

All that these methods need of the tensors is their dot products, the Gram matrix: T x T numbers, from which the T
weights are computed in float64. The sum is then taken block by block. A method that compares row with row gets blocks
of whole rows and their `width`, and takes the dot products of each row from the block.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from polymerge.errors import RecipeError
from polymerge.methods.kernels import AnyBlock, dots, gram_of, join_rows, weighted_sum
from polymerge.methods.weights import PerModel, per_model, shares

__all__ = ["arc_weights", "karcher", "model_stock", "multislerp", "nuslerp", "slerp"]

NEARLY_PARALLEL = 0.9995
NO_DIRECTION = 1e-8
"""Norm up to which a tensor counts as having no direction."""

Gram = NDArray[np.float64]
"""Dot products of the models' tensors, [model, model]."""


def slerp(models: AnyBlock, t: float, *, gram: Gram | None = None) -> AnyBlock:
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


def nuslerp(
    models: AnyBlock,
    weight: PerModel,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    *,
    gram: Gram | None = None,
    width: int | None = None,
) -> AnyBlock:
    """Interpolate two models, or their deltas, along the arc between their directions, by weights.

    mergekit's `nuslerp`: the second model's share of the weights is the position on the arc. Unlike `slerp` it has no
    straight line for nearly parallel tensors; there is one only where the sine of the angle is below 1e-8. The angle is
    computed in float64; mergekit's, in float32, is off by some 1e-5 where tensors are nearly parallel.

    models   [2, n]   float32 or float64; deltas if the recipe has a base_model
    weight   [2]      not negative, and not both 0; mergekit also takes those that make a position outside of the arc
    nuslerp_flatten   whether the two tensors are flattened and make one angle; else there is an angle for each row
    nuslerp_row_wise  has no effect on flattened tensors; for others mergekit then takes angles between columns (it
                      means rows of the transposed matrix), which is refused
    gram     [2, 2]   the whole tensors' dot products; else those of `models`
    width             elements of each row, where there is an angle for each
    returns  [n]
    raises   RecipeError for any other number of models, negative weights, or weights that are both 0
    """
    if len(models) != 2:
        raise RecipeError(f"nuslerp: takes two models, got {len(models)}")
    if nuslerp_row_wise and not nuslerp_flatten:
        raise RecipeError("nuslerp: angles between columns are not offered. Leave nuslerp_row_wise out")
    first, second = per_model(weight, 2, "weight", low=0.0)
    if first + second == 0:
        raise RecipeError("nuslerp: the two weights are both 0")
    t = second / (first + second)
    return _by_gram(models, lambda one: arc_weights(one, t, math.inf), gram, None if nuslerp_flatten else width)


def model_stock(
    deltas: AnyBlock, filter_wise: bool = False, *, gram: Gram | None = None, width: int | None = None
) -> AnyBlock:
    """Pull the mean of the models towards their base, the more so the more their deltas differ in direction.

    Jang et al. 2024, arXiv:2403.19522, equation 6: T deltas whose pairwise cosines average c keep
    T c / (1 + (T - 1) c) of their mean. The paper takes it layer by layer; here, as in mergekit, it is tensor by
    tensor, or row by row. A cosine with a delta of no direction counts as 0; where the divisor is not positive (deltas
    that cancel each other) the base is kept.

    deltas       [model, n]  of two or more models, float32 or float64
    filter_wise  whether every row of a tensor has a cosine of its own
    gram         [model, model]  the whole tensors' dot products; else those of `deltas`
    width        elements of each row, if `filter_wise`; a tensor of one dimension is one row
    returns      [n]         the merged delta
    raises       RecipeError for a single model
    """
    if len(deltas) < 2:
        raise RecipeError("model_stock: takes two models or more, and a base_model")
    return _by_gram(deltas, _stock_weights, gram, width if filter_wise else None)


def karcher(models: AnyBlock, max_iter: int = 10, tol: float = 1e-5, *, gram: Gram | None = None) -> AnyBlock:
    """Average the directions of the models on the sphere, and their norms apart: the Karcher mean.

    Karcher 1977, "Riemannian center of mass and mollifier smoothing", by fixed-point iteration on unit vectors, as in
    mergekit. All models count alike. One whose tensor has no direction (a norm of at most `tol`) does not take part.

    models    [model, n]  float32 or float64
    max_iter  iterations at most
    tol       length of a step, in radians, at which it ends
    gram      [model, model]  the whole tensors' dot products; else those of `models`
    returns   [n]
    """
    return weighted_sum(models, _karcher_weights(gram_of(models) if gram is None else gram, max_iter, tol))


def multislerp(
    models: AnyBlock,
    weight: PerModel,
    normalize_weights: bool = True,
    eps: float = 1e-8,
    *,
    gram: Gram | None = None,
) -> AnyBlock:
    """Average the models' directions, or those of their deltas, by weights, and give the result their average norm.

    mergekit's `multislerp`: the weighted mean of the unit vectors is projected onto the sphere; from there, one step
    along the weighted mean of the tangents (0 up to rounding, since the mean is that of the same vectors); then the
    weighted mean of the norms is the length.

    models   [model, n]  float32 or float64; deltas if the recipe has a base_model
    weight   [model]     each model's coefficient
    normalize_weights    divide the weights by their sum
    eps      length of the mean of unit vectors below which it has no direction
    gram     [model, model]  the whole tensors' dot products; else those of `models`
    returns  [n]         zero where no model has a direction
    raises   RecipeError where the weights add up to 0 and are to be normalised, or the directions cancel each other
    """
    weights = shares(weight, len(models), normalize_weights)
    return weighted_sum(models, _sphere_weights(gram_of(models) if gram is None else gram, weights, eps))


def arc_weights(gram: Gram, t: float, nearly_parallel: float = NEARLY_PARALLEL) -> tuple[float, float]:
    """The two tensors' coefficients at `t`, from their dot products [2, 2].

    nearly_parallel  the magnitude of the cosine above which the arc is a straight line; it always is where the sine of
                     the angle is below 1e-8
    """
    if not 0 <= t <= 1:
        raise RecipeError(f"t: {t} is not in [0, 1]")
    # one square root after the other: their product cannot overflow where that of the squares would
    norms = [math.sqrt(gram[place, place]) for place in range(2)]
    cosine = float(gram[0, 1]) / (norms[0] * norms[1]) if min(norms) > NO_DIRECTION else 0.0
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if abs(cosine) > nearly_parallel or math.sin(angle) < NO_DIRECTION:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _by_gram(
    models: AnyBlock, weights_of: Callable[[Gram], tuple[float, ...]], gram: Gram | None, width: int | None
) -> AnyBlock:
    """The weighted sum of a block, with one set of weights, or, given a `width`, one for each row of the tensor."""
    if width is None:
        return weighted_sum(models, weights_of(gram_of(models) if gram is None else gram))
    rows = dots(models, width)
    return join_rows(
        [
            weighted_sum(models[:, number * width : (number + 1) * width], weights_of(row))
            for number, row in enumerate(rows)
        ]
    )


def _units(gram: Gram, least: float = NO_DIRECTION) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The norms [model], and the cosines [model, model]; both are 0 for a model without a direction."""
    norms = np.sqrt(np.diagonal(gram))
    directed = norms > least
    scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=directed)
    # of a model whose square overflows they are NaN, as is then the merge, which nobody writes
    with np.errstate(over="ignore", invalid="ignore"):
        cosines = np.clip(gram * scale[:, None] * scale[None, :], -1.0, 1.0)
    return np.where(directed, norms, 0.0), cosines


def _stock_weights(gram: Gram) -> tuple[float, ...]:
    models = len(gram)
    _, cosines = _units(gram)
    mean = math.fsum(cosines[np.triu_indices(models, 1)]) / (models * (models - 1) / 2)
    divisor = 1 + (models - 1) * mean
    kept = 0.0 if divisor <= NO_DIRECTION else models * mean / divisor
    return (kept / models,) * models


def _karcher_weights(gram: Gram, max_iter: int, tol: float) -> list[float]:
    """Coefficients of the models; a unit vector is held by its coefficients of the models' own unit vectors."""
    norms, cosines = _units(gram, tol)
    count = int(np.count_nonzero(norms))
    if not count:
        return [0.0] * len(norms)
    share = np.where(norms > 0, 1.0 / count, 0.0)
    if (length := _length(share, cosines)) > tol:
        mean = share / length
    else:  # directions that cancel each other: from the first of them, as good as any
        mean = np.eye(len(norms))[int(np.argmax(norms > 0))]
    for _ in range(max_iter):
        beside = _along(cosines, mean)
        angles = np.arccos(beside)
        turned = (norms > 0) & (angles > tol)
        pull = np.divide(share * angles, np.sin(angles), out=np.zeros_like(angles), where=turned)
        step = pull - math.fsum(pull * beside) * mean
        if (length := _length(step, cosines)) <= tol:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * step
        mean = mean / max(_length(mean, cosines), NO_DIRECTION)
    size = math.fsum(share * norms)
    return [size * float(part) / float(norm) if norm else 0.0 for part, norm in zip(mean, norms, strict=True)]


def _sphere_weights(gram: Gram, weights: list[float], eps: float) -> list[float]:
    norms, cosines = _units(gram)
    share = np.where(norms > 0, weights, 0.0)
    length = _length(share, cosines)
    if not norms.any():
        return [0.0] * len(weights)
    if length <= eps:
        raise RecipeError(
            "multislerp: the directions of the models cancel each other out, and their mean has none. Give them other "
            "weights"
        )
    mean = share / length
    tangent = share - math.fsum(share * _along(cosines, mean)) * mean
    angle = _length(tangent, cosines)
    turned = mean if angle <= eps else math.cos(angle) * mean + math.sin(angle) / angle * tangent
    size = math.fsum(np.asarray(weights) * norms)
    return [size * float(part) / float(norm) if norm else 0.0 for part, norm in zip(turned, norms, strict=True)]


def _along(cosines: Gram, vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """The dot products of the models' unit vectors with a unit vector given by its coefficients of them."""
    return np.clip([math.fsum(row * vector) for row in cosines], -1.0, 1.0)


def _length(vector: NDArray[np.float64], cosines: Gram) -> float:
    """The length of a vector given by its coefficients of unit vectors."""
    return math.sqrt(max(math.fsum((np.outer(vector, vector) * cosines).ravel()), 0.0))
