"""Methods that look for one delta which interferes least with each model's, in closed form.

All minimise sum_t |(X - D_t) A_t^T|_F^2 / |D_t|_F^2, where the rows of A_t stand for the inputs that the matrix sees
in model t: its own delta (SWUDI, ASWUDI), or the largest components of it (OptMerge). Of the sum of A_t^T A_t /
|D_t|^2, with eigenvalues l and eigenvectors Q, each column of X Q goes its own way from the start to the minimum:
by 1 - f(l) of it, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np

from polymerge.errors import RecipeError
from polymerge.methods.decompositions import (
    Matrix,
    add_up,
    components,
    dots_of_columns,
    eigen,
    eigenvectors,
    gram_of_columns,
    joined,
    multiply,
    square_of,
    tall,
    unfilled,
    weighed_square,
)
from polymerge.methods.lora import Wide

__all__ = ["Init", "RankRule", "aswudi", "optmerge", "swudi"]

STEPS, RATE, MOMENTUM = 300, 1e-4, 0.9
"""OptMerge's descent."""
TIME = 300.0
"""SWUDI's time of gradient flow."""
LEAST = 1e-8
"""Eigenvalues below this one are left out, as in the released code; together they add up to the number of models."""

Init = Literal["sum", "mean", "zero"]
RankRule = Literal["participation_sqrt", "gavish_donoho"]


def optmerge(deltas: Matrix, *, ranks: Sequence[int] | None = None) -> Matrix:
    """Start from the mean of the deltas and go, for 300 steps, towards what interferes least with each one's largest
    components.

    OptMerge (WUDI v2), arXiv:2505.19892 (ICLR 2026), as released: T_t is D_t cut to its largest min(m, n) // T
    components U S V^T, and sum_t |(X - T_t) V S|_F^2 / |D_t|_F^2 is lowered by 300 steps of gradient descent with
    momentum 0.9 and rate 1e-4. Where we differ: no steps are taken. They multiply the distance to the minimum, along
    each eigenvector, by a polynomial of the eigenvalue, and the result is that.

    deltas   [model, m, n]  float32 or float64, finite; overwritten
    ranks    [model]        components of each model, in place of min(m, n) // T
    returns  [m, n]         the merged delta, in the memory of the first one
    """
    stack = tall(deltas)
    models, _, size = stack.shape
    x = unfilled(stack[0])
    add_up(stack, x, [1 / models] * models)
    parts, smalls = [], []
    for matrix, most in zip(stack, ranks or [size // models] * models, strict=True):
        norm = np.sqrt(square_of(matrix)) or 1.0
        found = components(matrix, most)
        parts.append(matrix[:, : len(found.s)])
        # of the basis B = [V S / |D_t|] and the other side, U S^2 / |D_t|, one is long
        multiply([matrix], found.v * ((found.s if stack is deltas else 1.0) / norm), parts[-1])
        smalls.append(found.v * ((found.s if stack is deltas else found.s**2) / norm))
        del found
    small = joined(smalls, 1)
    smalls.clear()
    merged: Matrix = deltas[0]
    if stack is deltas:
        way = _way(small.T @ small) @ small.T
        back = small @ way
        back *= -1
        multiply([x], back, x, plus=x)
        del back, small
        multiply(parts, way, merged, plus=x)
    else:
        small -= dots_of_columns([x], parts)
        way = small @ _way(gram_of_columns(parts))
        multiply(parts, way.T, stack[0], plus=x)
    return merged


def _way(gram: Wide) -> Wide:
    """What lies between (L - X0 B) and B^T in X - X0, for the basis B, L = [U S^2 / |D_t|] and the Gram matrix of B.

    With B = Q sqrt(l) W^T, X - X0 = (G Q / l - X0 Q) (1 - f(l)) Q^T, and G = L B^T.
    """
    roots, w = eigen(gram)
    eigenvalues = roots**2
    left, speed = 0 * roots + 1, 0 * roots
    for _ in range(STEPS):
        speed = MOMENTUM * speed + 2 * eigenvalues * left
        left = left - RATE * speed
    return weighed_square(w, (1 - left) / eigenvalues, gram)


def swudi(deltas: Matrix, init: Init = "sum", share: float = 0.65) -> Matrix:
    """Go from the sum of the deltas towards what interferes least with each of them, along the main directions.

    SWUDI (2026; MLLMerging, the repository of OptMerge), as released: of C = sum_t D_t^T D_t / |D_t|_F^2, [n, n], the
    share * n largest eigenvalues l, rounded up, one at least; along these eigenvectors gradient flow for a time of 300
    leaves exp(-300 l) of the distance to the minimum. Eigenvalues below 1e-8 do not count. The result has the size of a
    sum.

    deltas   [model, m, n]  float32 or float64, finite; overwritten. n is the inputs' side
    init     the start: the sum of the deltas, their mean, or zero
    share    of the n directions, in [0, 1]
    returns  [m, n]         the merged delta, in the memory of the first one
    raises   RecipeError where `init` is another word or the share is out of range
    """
    if not 0 <= share <= 1:
        raise RecipeError(f"share: {share} is not in [0, 1]")
    count = max(1, int(share * deltas.shape[-1] + 0.999))

    def way(found: Wide) -> Wide:
        return -np.expm1(-TIME * found[:count])

    return _towards_least(deltas, init, way)


def aswudi(deltas: Matrix, init: Init = "sum", rank_rule: RankRule = "participation_sqrt") -> Matrix:
    """Like `swudi`, all the way, along as many directions as the eigenvalues themselves tell.

    ASWUDI (2026; MLLMerging, the repository of OptMerge), as released: (sum sqrt l)^2 / sum l directions, rounded up
    (participation_sqrt), or those whose root exceeds a multiple of the median root (gavish_donoho): what Gavish and
    Donoho 2014, arXiv:1305.5870, have for known noise, divided by sqrt((1 - b)^2 + b), where they divide by the median
    of the Marchenko-Pastur law; b is the ratio of the matrix's sides. All n eigenvalues count, those below 1e-8 as
    1e-8, and one direction at least is taken.

    deltas     [model, m, n]  float32 or float64, finite; overwritten. n is the inputs' side
    init       the start: the sum of the deltas, their mean, or zero
    rank_rule  how many directions
    returns    [m, n]         the merged delta, in the memory of the first one
    raises     RecipeError where `init` or `rank_rule` is another word
    """
    if rank_rule not in get_args(RankRule):
        raise RecipeError(f"rank_rule: '{rank_rule}' is not one of {', '.join(get_args(RankRule))}")
    m, n = deltas.shape[-2:]

    def way(found: Wide) -> Wide:
        roots = np.sqrt(np.concatenate([found, np.full(n - len(found), LEAST)]))
        if rank_rule == "participation_sqrt":
            count = int(np.ceil(roots.sum() ** 2 / np.square(roots).sum()))
        else:
            b = min(m, n) / max(m, n)
            known = 2 * (b + 1) + 8 * b / (b + 1 + np.sqrt(b * b + 14 * b + 1))
            threshold = np.sqrt(known / ((1 - b) ** 2 + b)) * roots[n // 2]
            count = max(1, int(np.count_nonzero(roots > threshold)))
        return np.ones(min(count, len(found)))

    return _towards_least(deltas, init, way)


def _towards_least(deltas: Matrix, init: Init, way: Callable[[Wide], Wide]) -> Matrix:
    """Go the `way` that is to be gone along the largest eigenvectors, given all eigenvalues, largest first."""
    models, m, n = deltas.shape
    if init not in get_args(Init):
        raise RecipeError(f"init: '{init}' is not one of {', '.join(get_args(Init))}")
    begin = {"sum": 1.0, "mean": 1 / models, "zero": 0.0}[init]
    norms = [np.sqrt(square_of(delta)) or 1.0 for delta in deltas]
    merged: Matrix = deltas[0]
    if n <= models * m:
        total = np.zeros((n, n))
        for delta, norm in zip(deltas, norms, strict=True):
            own = gram_of_columns([delta])
            own /= norm**2
            total += own
        del own
        eigenvalues, q, f = _gone(total, way)
        there = weighed_square(q, f / eigenvalues, total)
        stay = weighed_square(q, eigenvalues)
        del q
        stay *= -begin
        stay[np.diag_indices(n)] += begin
        for delta, norm in zip(deltas, norms, strict=True):
            right = gram_of_columns([delta]) @ there
            right /= norm**2
            right += stay
            multiply([delta], right, delta)
            del right
        add_up(deltas, merged)
    else:
        # what is sought is some [m, T m] times the deltas below each other, and so are the eigenvectors
        lying = deltas.swapaxes(1, 2)
        scales = np.repeat(norms, m)
        gram = gram_of_columns(lying)
        gram /= scales
        gram /= scales[:, None]
        places = [slice(first, first + m) for first in range(0, models * m, m)]
        squares = [norm * gram[at, at] for norm, at in zip(norms, places, strict=True)]
        eigenvalues, w, f = _gone(gram, way)
        del gram
        # w diagonalises the Gram matrix, which the start and the minimum are parts of
        ways = sum(square @ w[at] for square, at in zip(squares, places, strict=True)) * (f / eigenvalues)
        ways -= sum(begin * norm * w[at] for norm, at in zip(norms, places, strict=True)) * f
        right = ways @ w.T
        del w, ways
        right /= scales
        right += begin * np.tile(np.eye(m), models)
        multiply(lying, right.T, merged.T)
    return merged


def _gone(gram: Wide, way: Callable[[Wide], Wide]) -> tuple[Wide, Wide, Wide]:
    """The eigenvalues along which some way is gone, their eigenvectors, and these ways; `gram` is overwritten."""
    ways = []

    def wanted(eigenvalues: Wide) -> int:
        ways.append(way(eigenvalues[eigenvalues >= LEAST]))
        return len(ways[0])

    eigenvalues, q = eigenvectors(gram, wanted)
    return eigenvalues, q, ways[0]
