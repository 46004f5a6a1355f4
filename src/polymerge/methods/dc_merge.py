"""DC-Merge: vote where directions of the models meet, in a space that all directions span together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import numpy as np

from polymerge.errors import RecipeError
from polymerge.methods.decompositions import (
    Matrix,
    components,
    eigen,
    gram_of_columns,
    joined,
    multiply,
    tall,
    weighed_square,
)
from polymerge.methods.lora import Wide

__all__ = ["Smoothing", "dc_merge"]

SAME = 2.0**-20
"""Relative difference up to which two magnitudes are equal: those of smoothed singular values differ by rounding."""

Smoothing = Literal["none", "avg", "linear"]


def dc_merge(
    deltas: Matrix,
    keep: float = 0.001,
    smoothing: Smoothing | None = None,
    rho: float = 5.0,
    *,
    ranks: Sequence[int] | None = None,
) -> Matrix:
    """Write each delta's largest components between common bases, keep its largest entries there, and average those
    that agree in sign.

    DC-Merge (CVPR 2026), as released: of T deltas U_t S_t V_t^T each keeps its min(m, n) // T largest components; side
    by side they give U~ and V~, the nearest matrices with orthonormal columns, and M_t = U~^T U_t S_t V_t^T V~. Of each
    M_t the `int(keep * min(m, n)^2)` largest entries stay, one at least; an entry of the merged M is the mean of
    those whose sign is that of their sum; its blocks between the directions of different models are dropped, and U~ M
    V~^T is the merged delta. For adapters the singular values of each are smoothed first. Where we differ: all entries
    stay that equal the least of those kept, and directions that are zero up to rounding take no part. Of T equal models
    this makes one, divided by T.

    deltas     [model, m, n]  float32 or float64, finite; overwritten
    keep       share of min(m, n)^2 entries, in [0, 1]
    smoothing  of each model's singular values, whose sum stays: none, avg (all equal), or linear (falling evenly, the
               first `rho` times the last, or as many times as it was if that is less); default: avg of adapters' cores,
               which come with `ranks`, as in the paper's code, else none
    ranks      [model]        components of each model, in place of min(m, n) // T
    returns    [m, n]         the merged delta, in the memory of the first one
    raises     RecipeError where `keep` or `rho` is out of range, or `smoothing` another word
    """
    if not 0 <= keep <= 1 or rho < 1:
        raise RecipeError(f"keep, rho: {keep} is not in [0, 1], or {rho} is not at least 1")
    if smoothing is None:
        smoothing = "none" if ranks is None else "avg"
    if smoothing not in get_args(Smoothing):
        raise RecipeError(f"smoothing: '{smoothing}' is not one of {', '.join(get_args(Smoothing))}")
    stack = tall(deltas)
    models, _, size = stack.shape
    lefts, rights, values = [], [], []
    for matrix, most in zip(stack, ranks or [size // models] * models, strict=True):
        found = components(matrix, most)
        lefts.append(matrix[:, : len(found.s)])
        multiply([matrix], found.to_left, lefts[-1])
        rights.append(found.v)
        values.append(_smoothed(found.s, smoothing, rho))
        del found
    ends = np.cumsum([0, *(len(s) for s in values)])
    places = [slice(start, stop) for start, stop in pairwise(ends)]
    right = joined(rights, 1)
    rights.clear()
    # where P S Q^T are the columns side by side, P Q^T are the common ones, and Q S Q^T leads from these to those
    of_right, q_right = eigen(right.T @ right)
    of_left, q_left = eigen(gram_of_columns(lefts))
    voters: list[list[Wide]] = [[] for _ in places]
    for s, own in zip(values, places, strict=True):
        one, other = q_left @ (s[:, None] * q_left[own] * of_left).T, q_right @ (q_right[own] * of_right).T
        least = _cutoff(one, other, max(1, int(keep * size**2)))
        for at, voter in zip(places, voters, strict=True):
            block = one[at] @ other[at].T
            voter.append(np.where(np.abs(block) >= least, block, 0.0))
    multiply([right], q_right / of_right, right[:, : len(of_right)])
    middle = weighed_square(q_left, 1 / of_left)
    del q_left
    for at, voter in zip(places, voters, strict=True):
        middle[:, at] = middle[:, at] @ _elected(np.stack(voter))
        voter.clear()
    middle = middle @ q_right
    multiply(lefts, middle @ right[:, : len(of_right)].T, stack[0])
    merged: Matrix = deltas[0]
    return merged


def _smoothed(s: Wide, smoothing: Smoothing, rho: float) -> Wide:
    if smoothing == "none" or not len(s):
        return s
    shape = np.ones(len(s)) if smoothing == "avg" else np.linspace(min(rho, s[0] / s[-1]), 1, len(s))
    smooth: Wide = shape * (s.sum() / shape.sum())
    return smooth


def _cutoff(one: Wide, other: Wide, count: int) -> float:
    """The magnitude of the `count`-th largest entry of one times the other transposed, or a little less."""
    size = len(one)
    if count >= size**2:
        return 0.0
    sizes = np.empty((size, size), np.float32)
    multiply([one], other.T, sizes)
    np.abs(sizes, out=sizes)
    flat = sizes.reshape(-1)
    flat.partition(-count)
    return float(flat[-count]) * (1 - SAME)


def _elected(blocks: Wide) -> Wide:
    """The mean over the models of those entries whose sign is that of their sum; zero where none has it."""
    sign = np.sign(blocks.sum(axis=0))
    agree = (np.sign(blocks) == sign) & (sign != 0)
    mean: Wide = (blocks * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
    return mean
