"""Calibration of the singular values of a merged delta, whatever method it comes from."""

from __future__ import annotations

import numpy as np

from polymerge.errors import RecipeError
from polymerge.methods.decompositions import (
    NOTHING,
    Matrix,
    components,
    dots_of_columns,
    gram_of_columns,
    multiply,
    square_of,
    tall,
    weighed_square,
)

__all__ = ["svc"]


def svc(merged: Matrix, deltas: Matrix, alpha: float = 1.0) -> Matrix:
    """Lower the singular values of a merged delta where the models' deltas add up in it.

    SVC, arXiv:2602.05536, equations 8 and 9 and algorithm 1 as fusion_bench has it (the authors' code was not at hand):
    of the merged delta U S V^T each row u_r^T X of U^T X is projected on that of each model, s_rt = <u_r^T X, u_r^T
    D_t> / |u_r^T D_t|^2, and the singular value is multiplied by T / sum_t max(alpha, s_rt). Where a model has nothing
    along u_r but rounding, its s_rt is 0.

    merged   [m, n]         float32 or float64, finite; overwritten
    deltas   [model, m, n]  the deltas that it was merged from
    alpha    the least projection that counts, above 0: below 1 singular values may also grow
    returns  [m, n]         the calibrated delta, in the memory of `merged`
    raises   RecipeError unless `alpha` is above 0
    """
    if alpha <= 0:
        raise RecipeError(f"alpha: {alpha} is not above 0")
    upright, stack = tall(merged), tall(deltas)
    found = components(upright)
    total = np.zeros(len(found.s))
    for delta in stack:
        dots = dots_of_columns([upright], [delta])
        if upright is merged:
            rows = found.v.T @ dots
            along = np.einsum("nr,rn->r", found.v, rows)
            squares = np.einsum("rn,rn->r", rows, rows) / found.s**2
            del rows
        else:
            along = np.einsum("nr,nr->r", found.v, dots @ found.v)
            dots = gram_of_columns([delta])
            squares = np.einsum("nr,nr->r", found.v, dots @ found.v)
        del dots
        present = squares > NOTHING**2 * square_of(delta)
        total += np.maximum(alpha, np.divide(along, squares, out=np.zeros_like(along), where=present))
    multiply([upright], weighed_square(found.v, len(deltas) / total), upright)
    return merged
