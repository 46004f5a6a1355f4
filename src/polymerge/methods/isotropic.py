"""Isotropic merging: all singular values of the merged delta are made equal."""

from __future__ import annotations

import numpy as np

from polymerge.errors import RecipeError
from polymerge.methods.decompositions import (
    NOTHING,
    Matrix,
    add_up,
    components,
    dots_of_columns,
    gram_of_columns,
    inverse_root,
    joined,
    multiply,
    orthogonal,
    square_of,
    tall,
    unfilled,
    weighed_square,
)

__all__ = ["iso_c", "iso_cts"]


def iso_c(deltas: Matrix) -> Matrix:
    """Sum the deltas and give all directions of the sum the same strength, the mean of its singular values.

    Marczak et al. 2025, arXiv:2502.04959 (ICML 2025), section 4.1, Iso-C: for a sum U S V^T the merged delta is
    mean(S) U V^T. The mean is over all min(m, n) singular values; where the sum lacks a direction (a value of zero up
    to rounding), it stays zero, where the paper's SVD has an arbitrary one.

    deltas   [model, m, n]  float32 or float64, finite; overwritten
    returns  [m, n]         the merged delta, in the memory of the first one
    """
    stack = tall(deltas)
    total = stack[0]
    add_up(stack, total)
    found = components(total)
    multiply([total], weighed_square(found.v, found.s.sum() / total.shape[1] / found.s), total)
    merged: Matrix = deltas[0]
    return merged


def iso_cts(deltas: Matrix, common_space_fraction: float = 0.8) -> Matrix:
    """Join what the deltas have in common with what is each model's own, and give all directions the same strength.

    Marczak et al. 2025, arXiv:2502.04959 (ICML 2025), section 4.2 and algorithm 2, Iso-CTS: of the sum the c largest
    components, and of each delta, its part along their left vectors taken off, the q largest, with c + T q = min(m, n)
    and c as near to its fraction as that allows. The vectors of all are made orthogonal (the nearest orthonormal
    ones), and the strength is the mean of their singular values. The released code rounds (p - c) / T to the nearest
    number for q, as do we unless c would be negative; directions that are zero up to rounding stay zero.

    deltas                 [model, m, n]  float32 or float64, finite; overwritten
    common_space_fraction  share of the components that come from the sum, in [0, 1]
    returns                [m, n]         the merged delta, in the memory of the first one
    raises                 RecipeError for a share out of range
    """
    if not 0 <= common_space_fraction <= 1:
        raise RecipeError(f"common_space_fraction: {common_space_fraction} is not in [0, 1]")
    stack = tall(deltas)
    models, _, size = stack.shape
    rest = size - int(common_space_fraction * size)
    own = min(round(rest / models), size // models)
    common = unfilled(stack[0])
    add_up(stack, common)
    shared = components(common, size - models * own)
    count = len(shared.s)
    multiply([common], shared.to_left, common[:, :count])
    common = common[:, :count]
    lefts, rights, strengths = [common], [shared.v], [shared.s]
    for matrix in stack:
        rounding = 4 * NOTHING * float(np.sqrt(square_of(matrix)))
        along = dots_of_columns([common], [matrix]) if stack is deltas else shared.v @ shared.v.T
        along *= -1
        multiply([common if stack is deltas else matrix], along, matrix, plus=matrix)
        del along
        found = components(matrix, own, rounding)
        left = matrix[:, : len(found.s)]
        multiply([matrix], found.to_left, left)
        lefts.append(left)
        rights.append(found.v)
        strengths.append(found.s)
    del shared, found
    right = orthogonal(rights)
    right *= joined(strengths).sum() / size
    multiply(lefts, inverse_root(gram_of_columns(lefts)) @ right.T, stack[0])
    merged: Matrix = deltas[0]
    return merged
