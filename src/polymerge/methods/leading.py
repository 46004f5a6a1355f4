"""The largest components of a dense matrix as two factors: as many as are wanted, or as hold a share of its energy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polymerge.errors import RecipeError
from polymerge.methods.decompositions import components, multiply, tall
from polymerge.methods.lora import BLOCK, EXACT, SPARE, Decomposition, Factors, check_rank, signed, sketched

__all__ = ["energy_of", "largest", "leading", "rank_for", "residual", "residuals", "room_for"]

FEW = 8
"""Subspace iteration is quicker than the Gram matrix up to about an eighth of all directions."""


_ROUNDING = 2.0**-41
"""What float64 cannot tell from all of an energy, for some hundred components."""


def leading(matrix: NDArray[np.float32], most: int, energy: float | None = None) -> Factors:
    """Approximate a matrix by its largest singular components.

    Eckart and Young 1936: no factors of that rank are closer in the Frobenius norm. By a full SVD in float64 if the
    shorter side is at most 512; by the eigenvectors of the Gram matrix if many components are wanted, without those
    below 2^-23 of the largest; else by subspace iteration (`lora.sketched`), whose error is optimal to many digits if
    the singular values decay, and about a thousandth larger for noise.

    matrix   [out, in], finite
    most     the rank, at least 1; with `energy` the highest one
    energy   in (0, 1]: take the smallest rank whose squared singular values are that share of all of them
    returns  `b` [out, r] and `a` [r, in], float32, both with the roots of the singular values; r is at most the
             shorter side, and 0 for a matrix of zeros if `energy` is said
    raises   RecipeError where `most` is below 1 or `energy` is no share
    """
    if energy is not None and not 0 < energy <= 1:
        raise RecipeError(f"energy: {energy} is no share between 0 and 1")
    parts, rank = largest(matrix, most), min(most, *matrix.shape)
    if energy is not None:
        rank = rank_for(np.cumsum(np.square(parts.s[:rank])), energy_of(matrix), energy)
    return parts.factors(rank)


def largest(matrix: NDArray[np.float32], most: int) -> Decomposition:
    """The largest singular components of a matrix, in float64, as `leading` finds them: at most `most` that are meant,
    and some more or fewer.
    """
    check_rank(most)
    most = min(most, *matrix.shape)
    wanted = 2 * most + SPARE
    if min(matrix.shape) <= EXACT:
        return signed(*np.linalg.svd(matrix.astype(np.float64), full_matrices=False))
    if min(matrix.shape) < FEW * wanted:
        return _by_gram(matrix, most)
    return sketched(matrix, wanted)


def room_for(rows: int, columns: int, most: int) -> int:
    """Bytes of memory that `leading` and `residuals` take at most for a matrix of this shape, itself included."""
    short, long = sorted((rows, columns))
    wanted = 2 * min(most, short) + SPARE
    if short <= EXACT:
        beside = 3 * short * long + 6 * short**2
    elif short < FEW * wanted:
        beside = 5 * short**2 + 2 * min(most, short) * (short + long)
    else:
        beside = 3 * wanted * (short + long)
    return 4 * rows * columns + 8 * (beside + 3 * min(BLOCK, rows) * columns)


def rank_for(held: NDArray[Any], whole: float, energy: float) -> int:
    """The smallest rank whose components hold a share of a squared norm, or all ranks if none does.

    held   [r], the squared norm of the first 1, 2, ... components, in float64
    whole  the squared norm; 0 for rank 0
    """
    enough = np.flatnonzero(held >= energy * whole * (1 - _ROUNDING))
    return (int(enough[0]) + 1 if len(enough) else len(held)) if whole else 0


def _by_gram(matrix: NDArray[np.float32], most: int) -> Decomposition:
    """At most `most` components, from the Gram matrix of the shorter side."""
    long = tall(matrix)
    found = components(long, most)
    left = np.empty((len(long), len(found.s)))
    multiply([long], found.to_left, left)
    if long.shape == matrix.shape:
        return signed(left, found.s, np.ascontiguousarray(found.v.T))
    return signed(found.v, found.s, np.ascontiguousarray(left.T))


def energy_of(matrix: NDArray[np.float32]) -> float:
    """The sum of the squares of all entries, in float64: that of all squared singular values."""
    return sum(float(np.square(rows).sum()) for _, rows in _widened(matrix))


def residual(matrix: NDArray[np.float32], factors: Factors) -> float:
    """The squared Frobenius norm of what factors leave of a matrix, in float64.

    matrix   [out, in]; widened a block of rows at a time
    factors  as they are stored, `b` [out, r] and `a` [r, in], with r of 0 or more
    """
    above = factors.a.astype(np.float64)
    return sum(float(np.square(rows - factors.b[at].astype(np.float64) @ above).sum()) for at, rows in _widened(matrix))


def residuals(matrix: NDArray[np.float32], factors: Factors) -> NDArray[np.float64]:
    """The squared norms [r] of what the first 1, 2, ... components of factors leave of a matrix, as `residual` has the
    last of them, to about 1e-15 of the whole: by products with the matrix and of the factors with each other.
    """
    b, a = factors.b.astype(np.float64), factors.a.astype(np.float64)
    along, whole = np.zeros(factors.rank), 0.0
    for at, rows in _widened(matrix):
        along += (b[at] * (rows @ a.T)).sum(axis=0)
        whole += float(np.square(rows).sum())
    squares = np.cumsum(np.cumsum((b.T @ b) * (a @ a.T), axis=0), axis=1).diagonal()
    return np.maximum(whole - 2 * np.cumsum(along) + squares, 0.0)


def _widened(matrix: NDArray[np.float32]) -> Iterator[tuple[slice, NDArray[Any]]]:
    for start in range(0, len(matrix), BLOCK):
        at = slice(start, start + BLOCK)
        yield at, matrix[at].astype(np.float64)
