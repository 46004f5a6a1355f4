"""The largest singular directions of a matrix, and its effective rank."""

from __future__ import annotations

from collections.abc import Iterator
from math import exp, log
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from polymerge.methods.lora import Factors, decompose, of_dense, signed

__all__ = ["EXACT", "Spectrum", "effective_rank", "shared_share", "spectrum_of", "spectrum_of_factors"]

Wide = NDArray[np.float64]

EXACT: Final = 512
"""Matrices whose shorter side does not exceed this are decomposed in full."""

TAKEN_OUT: Final = 8
"""Minimum number of directions that an estimate computes exactly."""

STEPS, PROBES, ROWS = 32, 8, 4096
ROUNDING: Final = 2.0**-23
"""Shares of the norm below this are rounding errors."""


class Spectrum(NamedTuple):
    """The spectrum of a nonzero matrix [out, in].

    left, right  [out, k] and [in, k], orthonormal: the k largest directions, or all if there are fewer
    effective    its effective rank, from 1 to the shorter side
    exact        whether that is computed from all singular values rather than estimated
    """

    left: Wide
    right: Wide
    effective: float
    exact: bool


def effective_rank(values: Wide) -> float:
    """exp of the entropy of normalised singular values (Roy and Vetterli 2007).

    values  at least one, none negative, not all zero
    """
    logarithms = np.log(np.where(values > 0, values, 1.0))
    return _effective(float(values.sum()), float(np.vdot(values, logarithms)))


def _effective(total: float, weighted: float) -> float:
    """exp(H) for H = log(S) - T / S, with S the sum of singular values and T the sum of s log s."""
    entropy = log(total) - weighted / total
    return exp(entropy)


def shared_share(one: Wide, other: Wide) -> float:
    """Mean squared cosine of the principal angles between two subspaces, given by orthonormal columns.

    If their numbers of columns differ, the smaller number is used. 1 for equal subspaces; about k / n for
    two random ones of dimension k in n.
    """
    shared: int = min(one.shape[1], other.shape[1])
    cosines = one[:, :shared].T @ other[:, :shared]
    return min(float(np.vdot(cosines, cosines)) / shared, 1.0)


def spectrum_of_factors(factors: Factors, rank: int) -> Spectrum | None:
    """The exact spectrum of a product of factors; None if it is zero."""
    parts = decompose(factors)
    count = min(parts.determined, rank)
    if not count:
        return None
    return Spectrum(parts.u[:, :count], parts.v[:count].T, effective_rank(parts.s), True)


def spectrum_of(matrix: NDArray[np.float32], rank: int) -> Spectrum | None:
    """The spectrum of a dense matrix; None if it is zero.

    Exact if the shorter side is at most 512. Otherwise the directions are those of `of_dense` (randomised subspace
    iteration, Halko, Martinsson and Tropp 2011), and the effective rank is estimated: after deflating them, the
    sums of s and of s log s over all other singular values s are traces, which Lanczos bidiagonalisation from a few
    random vectors gives (stochastic Lanczos quadrature; Ubaru, Chen and Saad 2017, doi:10.1137/16M1104974). That is
    accurate to about five per cent. All draws are deterministic.

    If singular values around the `rank`-th are close to each other, the choice of directions among them is arbitrary.

    matrix  [out, in], finite; multiplied, in place, by a power of two
    rank    at least 1
    """
    peak = max(float(matrix.max()), -float(matrix.min()))  # an array of magnitudes would take as much room again
    if not peak:
        return None
    np.ldexp(matrix, -int(np.frexp(peak)[1]), out=matrix)  # neither squares nor sums can leave the range of float32
    if min(matrix.shape) <= EXACT:
        return _in_full(matrix, rank)
    factors, error = of_dense(matrix, max(rank, TAKEN_OUT))
    parts = decompose(factors)
    count = parts.determined
    known = parts.s[:count]
    total, weighted = float(known.sum()), float((known * np.log(known)).sum())
    if error > ROUNDING:
        tall = len(matrix) >= matrix.shape[1]
        inner = parts.v[:count].T if tall else parts.u[:, :count]
        more = _of_the_rest(matrix if tall else matrix.T, inner)
        total, weighted = total + more[0], weighted + more[1]
    effective = min(max(_effective(total, weighted), 1.0), float(min(matrix.shape)))
    count = min(count, rank)
    return Spectrum(parts.u[:, :count], parts.v[:count].T, effective, False)


def _in_full(matrix: NDArray[np.float32], rank: int) -> Spectrum:
    tall = matrix if len(matrix) >= matrix.shape[1] else matrix.T
    upper: NDArray[Any] = np.zeros((0, tall.shape[1]))
    for rows in _widened(tall):
        upper = np.asarray(np.linalg.qr(np.concatenate([upper, rows]), mode="r"))
    parts = signed(*np.linalg.svd(upper, full_matrices=False))
    count = min(parts.determined, rank)
    inner = parts.v[:count].T
    outer = np.concatenate([rows @ (inner / parts.s[:count]) for rows in _widened(tall)])
    left, right = (outer, inner) if tall is matrix else (inner, outer)
    return Spectrum(left, right, effective_rank(parts.s), True)


def _widened(tall: NDArray[Any]) -> Iterator[Wide]:
    """Blocks of rows, in float64."""
    for start in range(0, len(tall), ROWS):
        yield tall[start : start + ROWS].astype(np.float64)


def _of_the_rest(tall: NDArray[Any], inner: Wide) -> tuple[float, float]:
    """Estimates of the sums of s and of s log s over the singular values whose right vectors are not in `inner`.

    tall   [m, n], m >= n
    inner  [n, k], orthonormal
    """
    columns = tall.shape[1]
    draws = np.frombuffer(np.random.RandomState(1).bytes(columns * PROBES // 8 + 1), np.uint8)  # a frozen stream
    right: NDArray[Any] = 2.0 * np.unpackbits(draws)[: columns * PROBES].reshape(columns, PROBES) - 1
    right -= inner @ (inner.T @ right)
    lengths: NDArray[Any] = np.linalg.norm(right, axis=0)
    right /= lengths
    before = [right]
    left: Wide = np.zeros((len(tall), PROBES))
    middle = np.zeros((PROBES, STEPS, STEPS))
    beyond: Wide = np.zeros(PROBES)
    for step in range(STEPS):
        left = _times(tall, right) - beyond * left
        left, middle[:, step, step] = _unit(left)
        if step + 1 == STEPS:
            break
        right = _times(tall.T, left) - middle[:, step, step] * right
        for _ in range(2):  # kept orthogonal to all before, which rounding would undo
            right -= inner @ (inner.T @ right)
            for one in before:
                right -= one * (one * right).sum(axis=0)
        right, beyond = _unit(right)
        before.append(right)
        middle[:, step, step + 1] = beyond
    _, values, rows = np.linalg.svd(middle)
    shares = np.square(lengths)[:, None] * np.square(rows[:, :, 0]) / PROBES
    logarithms = np.log(np.where(values > 0, values, 1.0))
    return float((shares * values).sum()), float((shares * values * logarithms).sum())


def _times(matrix: NDArray[Any], vectors: Wide) -> Wide:
    """A product in the matrix's precision."""
    product: Wide = (matrix @ vectors.astype(matrix.dtype)).astype(np.float64)
    return product


def _unit(vectors: Wide) -> tuple[Wide, Wide]:
    """Normalise columns; returns them with their previous lengths. Columns of rounding errors become zero."""
    lengths = np.linalg.norm(vectors, axis=0)
    lengths = np.where(lengths > 1e-6, lengths, 0.0)
    return np.where(lengths > 0, vectors / np.where(lengths > 0, lengths, 1.0), 0.0), lengths
