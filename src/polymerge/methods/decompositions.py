"""Singular values and vectors of deltas, and what follows of them, for methods that need whole matrices.

The matrices are long and float32, so all that is formed beside them has the size of their smaller side, in float64: a
Gram matrix, in whose place its eigenvectors are computed, those that are wanted, and the matrix `right` that a method
multiplies a delta with. Three of that size at once are enough. Products take some rows at a time and add up in float64.
Singular vectors have no sign of their own: what is returned is to be used such that theirs cancels.

Float32 matrices are decomposed by the eigenvectors of the Gram matrix in float64, which squares the condition. This
costs a quarter of an SVD, and less accuracy than rounding the matrix to float32 did: where s is a singular value and s1
the largest, its vectors turn by up to about eps64 s1^2 / (2 s gap) here and eps32 s1 / gap there, so the first is the
smaller down to s = 2^-23 s1. Below that they are noise in both, and count as zero. Small float64 matrices, such as the
cores of adapters, are decomposed by SVD.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from polymerge.methods.lora import EXACT, Wide

__all__ = [
    "NOTHING",
    "Components",
    "Matrix",
    "add_up",
    "components",
    "dots_of_columns",
    "eigen",
    "eigenvectors",
    "gram_of_columns",
    "inverse_root",
    "joined",
    "multiply",
    "one_thread",
    "orthogonal",
    "square_of",
    "tall",
    "unfilled",
    "weighed_square",
]

Matrix = NDArray[Any]
"""Float32 or float64, [m, n] with m >= n, perhaps a transposed view; a numpy array or, on a GPU, a torch tensor."""

Wanted: TypeAlias = Callable[[Wide], int]
"""How many eigenvectors are wanted, told from the eigenvalues, the largest first."""

NOTHING = 2.0**-23
"""Singular values up to this share of the largest are rounding of float32."""
ROWS, FEWEST = 1 << 19, 256
"""Entries of a matrix that are widened to float64 at a time, and its fewest rows: products of fewer take longer."""


class Components(NamedTuple):
    """The largest components of a matrix [m, n]: `s` [k] descending, right vectors `v` [n, k]; both float64.

    The left vectors are the matrix times `v / s`.
    """

    s: Wide
    v: Wide

    @property
    def to_left(self) -> Wide:
        """What a matrix is multiplied with to get its left singular vectors."""
        scaled: Wide = self.v / self.s
        return scaled


def tall(deltas: Matrix) -> Matrix:
    """A view of matrices [..., m, n] whose last axis is the shorter one."""
    return deltas if deltas.shape[-2] >= deltas.shape[-1] else deltas.swapaxes(-1, -2)


def components(matrix: Matrix, most: int | None = None, least: float = 0.0) -> Components:
    """The `most` largest components of a matrix, without those that are zero up to rounding.

    Zero is what does not exceed 2^-23 of the largest singular value, or the rounding of a Gram matrix if that is more.

    matrix   [m, n], finite
    most     default: all
    least    singular values up to this one are zero as well, for a matrix that is the difference of larger ones
    returns  at most `most` components, none for a matrix of zeros
    """
    if matrix.dtype.itemsize == 8 and matrix.shape[1] <= EXACT:
        _, s, right = _library(matrix).linalg.svd(matrix, full_matrices=False)
        count = int((s > max(least, NOTHING * float(s[0]))).sum())
        count = count if most is None else min(most, count)
        return Components(s[:count], right[:count].T)
    return Components(*eigen(gram_of_columns([matrix]), most, least))


def gram_of_columns(matrices: Matrix | Sequence[Matrix]) -> Wide:
    """The dot products, in float64, of all columns of matrices [m, k_t] side by side."""
    width = sum(matrix.shape[1] for matrix in matrices)
    return _total(_squared(_wide(matrices, rows)) for rows in _blocks(matrices, width // 2))


def dots_of_columns(matrices: Matrix | Sequence[Matrix], others: Matrix | Sequence[Matrix]) -> Wide:
    """The dot products, in float64, of columns with columns: of matrices [m, k_t] and others [m, l_t] side by side."""
    return _total(_wide(matrices, rows).T @ _wide(others, rows) for rows in _blocks([*matrices, *others]))


def _total(parts: Iterator[Wide]) -> Wide:
    total = next(parts)
    for part in parts:
        total += part
        del part  # else it is there while the next one is made
    return total


def _squared(block: Wide) -> Wide:
    square: Wide = block.T @ block
    return square


def square_of(matrix: Matrix) -> float:
    """The squared Frobenius norm, in float64."""
    return float(sum((_wide([matrix], rows) ** 2).sum() for rows in _blocks([matrix])))


def multiply(matrices: Matrix | Sequence[Matrix], right: Wide, out: Matrix, plus: Matrix | None = None) -> None:
    """Multiply matrices [m, k_t], side by side, by `right` [sum of k_t, n], into `out` [m, n], rounded once.

    plus  [m, n]  is added
    out   may share its memory with any of the others, row by row
    """
    for rows in _blocks([*matrices, out]):
        block = _wide(matrices, rows) @ right
        if plus is not None:
            block += plus[rows]
        out[rows] = block
        del block


def add_up(matrices: Matrix | Sequence[Matrix], out: Matrix, weight: Sequence[float] | None = None) -> None:
    """Sum matrices of one shape, each times its weight, in float64, into `out`, which may be one of them."""
    weights = [1.0] * len(matrices) if weight is None else weight
    for rows in _blocks([out]):
        out[rows] = _total(number * _wide([x], rows) for x, number in zip(matrices, weights, strict=True))


def inverse_root(gram: Wide) -> Wide:
    """The inverse of the square root of a Gram matrix, symmetric, in its memory.

    Right of the columns that the Gram matrix is of, it gives their polar factor: the nearest matrix with orthonormal
    columns (P Q^T for P C Q^T). Where columns depend on each other up to rounding, what they lack stays zero, where an
    SVD has arbitrary vectors.
    """
    s, q = eigen(gram)
    return weighed_square(q, 1 / s, gram)


def weighed_square(columns: Wide, weight: Wide, out: Wide | None = None) -> Wide:
    """X w X^T, for columns X [n, k] that are overwritten, and weights w [k] that are not negative."""
    columns *= weight**0.5
    square: Wide = _library(columns).matmul(columns, columns.T, out=out)
    return square


def orthogonal(columns: list[Wide]) -> Wide:
    """The nearest matrix with orthonormal columns to columns side by side, which are taken out of the list."""
    every = joined(columns, 1)
    columns.clear()
    multiply([every], inverse_root(every.T @ every), every)
    return every


def eigen(gram: Wide, most: int | None = None, least: float = 0.0) -> tuple[Wide, Wide]:
    """The roots of the largest eigenvalues of a Gram matrix, and the eigenvectors, without those of zero.

    gram     [n, n]; overwritten
    most     how many at most; default: all
    least    roots up to this one are zero as well
    returns  roots [k] descending, and vectors [n, k]
    """

    def wanted(squares: Wide) -> int:
        s = squares.clip(0.0) ** 0.5
        count = int((s > max(least, float(s[:1].sum()) * _least(len(s)))).sum())
        return count if most is None else min(most, count)

    squares, q = eigenvectors(gram, wanted, most) if isinstance(gram, np.ndarray) else _on_device(gram, wanted)
    return squares.clip(0.0) ** 0.5, q


def eigenvectors(gram: Wide, wanted: Wanted, most: int | None = None) -> tuple[Wide, Wide]:
    """The largest eigenvalues of a symmetric matrix, and their eigenvectors.

    SciPy finds as many as are wanted in little more memory than the matrix and they take; without it, numpy takes five
    times that of the matrix.

    gram     [n, n], float64; overwritten
    wanted   tells how many
    most     how many that will be at most; default: all, and all eigenvalues are told
    returns  the eigenvalues [k] descending, and the eigenvectors as columns [n, k]
    raises   numpy.linalg.LinAlgError where they are not found
    """
    size, scipy = len(gram), _scipy()
    if not np.isfinite(np.diagonal(gram)).all():
        raise np.linalg.LinAlgError("its squares are too large for float64")
    first = 0 if most is None else max(0, size - max(1, most))
    if scipy is None or not size:
        squares, q = np.linalg.eigh(gram)
        squares, q = squares[first:], q[:, first:]
    else:  # symmetric, so that its transpose is the same in LAPACK's order, and is not copied
        how = {"overwrite_a": True, "check_finite": False, "driver": "evr", "subset_by_index": (first, size - 1)}
        squares, q = scipy.eigh(gram.T, **how)
    squares = squares[::-1]
    count = wanted(squares)
    vectors = q[:, len(q.T) - count :].T
    for row in range(count // 2):  # in place: a view in reverse would be copied by whatever it is multiplied with
        vectors[[row, count - 1 - row]] = vectors[[count - 1 - row, row]]
    return squares[:count], vectors.T


def one_thread() -> AbstractContextManager[object]:
    """Let linear algebra have one thread, also what is loaded when it is first needed."""
    _scipy()
    limited: AbstractContextManager[object] = threadpool_limits(1)
    return limited


@cache
def _scipy() -> Any:
    """SciPy's linear algebra; None where it is not installed."""
    try:
        import scipy.linalg
    except ImportError:
        return None
    return scipy.linalg


def joined(parts: Sequence[Wide], axis: int = 0) -> Wide:
    """Arrays one after the other along an axis."""
    together: Wide = _library(parts[0]).concatenate(tuple(parts), axis)
    return together


def unfilled(like: Matrix) -> Matrix:
    """An array of the shape and kind of another one, uninitialised."""
    array: Matrix = _library(like).empty_like(like)
    return array


def _on_device(gram: Wide, wanted: Wanted) -> tuple[Wide, Wide]:
    library = _library(gram)
    squares, q = library.linalg.eigh(gram)
    squares = library.flip(squares, (0,))
    count = wanted(squares)
    return squares[:count], library.flip(q[:, len(q) - count :], (1,))


def _least(size: int) -> float:
    """Singular values of a Gram matrix up to this share of the largest are rounding."""
    return max(NOTHING, float(np.sqrt(size * np.finfo(np.float64).eps)))


def _wide(matrices: Matrix | Sequence[Matrix], rows: slice) -> Wide:
    parts: list[Any] = [matrix[rows] for matrix in matrices]
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts, axis=1, dtype=np.float64)
    return joined([part.double() for part in parts], 1)


def _library(x: Matrix) -> Any:
    """Numpy, or torch for its tensors: the calls here have one name in both."""
    if isinstance(x, np.ndarray):
        return np
    import torch

    return torch


def _blocks(matrices: Matrix | Sequence[Matrix], fewest: int = 0) -> Iterator[slice]:
    rows = max(FEWEST, fewest, ROWS // max(1, sum(matrix.shape[1] for matrix in matrices)))
    for start in range(0, len(matrices[0]), rows):
        yield slice(start, start + rows)
