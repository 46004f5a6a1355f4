"""Isotropic merging: all singular values of the merged delta are made equal."""

from __future__ import annotations

from polymerge.methods.decompositions import Matrix, add_up, components, multiply, tall

__all__ = ["iso_c"]


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
    multiply([total], (found.to_left * (found.s.sum() / total.shape[1])) @ found.v.T, total)
    merged: Matrix = deltas[0]
    return merged
