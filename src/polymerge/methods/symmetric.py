"""Eigenvectors of symmetric matrices: as many as are wanted, the largest first, in little more memory than they take.

`numpy.linalg.eigh` computes all of them in five times the memory of the matrix. The LAPACK that numpy itself is linked
with can do with the matrix and the vectors that are wanted: it makes the matrix tridiagonal in place (dsytrd), finds
vectors of that by relatively robust representations (dstemr; Dhillon and Parlett 2004), and turns them back in place
(dormtr). Where the representations fail, as they may for many equal eigenvalues, all vectors of the tridiagonal matrix
are found by divide and conquer, as by `eigh` (dstedc), in as much memory again. Where LAPACK cannot be called, `eigh` is
what there is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from ctypes import CDLL, byref, c_char_p, c_double, c_int64, c_size_t
from functools import cache
from typing import Any

import numpy as np

from polymerge.methods.lora import Wide

__all__ = ["Wanted", "eigenvectors"]

Wanted = Callable[[Wide], int]
"""How many eigenvectors are wanted, told from all eigenvalues, the largest first."""

_NAMES = "scipy_{}_64_", "{}_64_", "{}_"
"""What LAPACK's functions are called in numpy's wheels, and in libraries of 64-bit or 32-bit integers."""
_BLOCK = 64
"""Columns that LAPACK takes at a time."""
_ORTHOGONAL = 1e-9
"""What the product of vectors with their transpose, and a vector of ones, may differ from that by."""


def eigenvectors(matrix: Wide, wanted: Wanted) -> tuple[Wide, Wide]:
    """The largest eigenvalues of a symmetric matrix, and their eigenvectors.

    matrix   [n, n], float64, finite, contiguous; overwritten
    wanted   tells how many
    returns  the eigenvalues [k] descending, and the eigenvectors as columns [n, k]
    raises   numpy.linalg.LinAlgError where they are not found
    """
    if not len(matrix) or (found := _lapack()) is None:
        squares, q = np.linalg.eigh(matrix)
        count = wanted(squares[::-1])
        return squares[::-1][:count], q[:, ::-1][:, :count]
    n = len(matrix)
    diagonal, beside, tau, work = np.empty(n), np.zeros(n), np.empty(n), np.empty(_BLOCK * n)
    found.call("dsytrd", b"L", n, matrix, n, diagonal, beside, tau, work, len(work))
    if not (np.isfinite(diagonal).all() and np.isfinite(beside).all()):
        raise np.linalg.LinAlgError("its squares are too large for float64")
    values = diagonal.copy()
    found.call("dsterf", n, values, beside[:-1].copy())
    values = values[::-1]
    count = wanted(values)
    vectors = np.empty((count, n))
    if count:
        _of_tridiagonal(found, diagonal, beside, vectors)
        found.call("dormtr", b"L", b"L", b"N", n, count, matrix, n, tau, vectors, n, work, len(work))
    return values[:count], vectors.T


def _of_tridiagonal(found: _Lapack, diagonal: Wide, beside: Wide, out: Wide) -> None:
    """The eigenvectors of a tridiagonal matrix for its largest eigenvalues, as rows into `out` [k, n], largest first."""
    count, n = out.shape
    if not _by_representations(found, diagonal, beside, out):
        every = out if count == n else np.empty((n, n))
        work, more = np.empty(1 + 4 * n + n**2), np.empty(3 + 5 * n, np.int64)
        found.call("dstedc", b"I", n, diagonal, beside, every, n, work, len(work), more, len(more))
        if count < n:
            out[:] = every[n - count :]
    for row in range(count // 2):
        out[[row, count - 1 - row]] = out[[count - 1 - row, row]]


def _by_representations(found: _Lapack, diagonal: Wide, beside: Wide, out: Wide) -> bool:
    """Whether dstemr finds what `_of_tridiagonal` does, but smallest first: it gives up some tight clusters."""
    count, n = out.shape
    held, support = c_int64(0), np.empty(2 * n, np.int64)
    values, work, more = np.empty(n), np.empty(18 * n), np.empty(10 * n, np.int64)
    which = b"V", b"I", n, diagonal.copy(), beside.copy(), 0.0, 0.0, n - count + 1, n
    try:
        found.call("dstemr", *which, held, values, out, n, count, support, c_int64(1), work, len(work), more, len(more))
    except np.linalg.LinAlgError:
        return False
    sample = np.where(np.arange(count) % 3 == 1, -1.0, 1.0)
    return held.value == count and bool(np.abs(out @ (sample @ out) - sample).max() < _ORTHOGONAL)


class _Lapack:
    """LAPACK's functions as Fortran has them, of a library that has them under names of this pattern.

    Integers are handed over as 64 bits, of which a library of 32-bit integers takes the lower half.
    """

    def __init__(self, library: CDLL, pattern: str) -> None:
        self._library, self._pattern = library, pattern

    def has(self, name: str) -> bool:
        """Whether the library has a function."""
        return hasattr(self._library, self._pattern.format(name))

    def call(self, name: str, *given: bytes | int | float | Wide | c_int64) -> None:
        """Call a function with these arguments and what tells its success.

        raises numpy.linalg.LinAlgError where that is none
        """
        done = c_int64(0)
        lengths = [c_size_t(1) for one in given if isinstance(one, bytes)]
        arguments = [_handed(one) for one in given]
        self._library[self._pattern.format(name)](*arguments, byref(done), *lengths)
        if done.value:
            raise np.linalg.LinAlgError(f"LAPACK's {name} returned {done.value}")


def _handed(one: bytes | int | float | Wide | c_int64) -> Any:
    match one:
        case bytes():
            return c_char_p(one)
        case int():
            return byref(c_int64(one))
        case float():
            return byref(c_double(one))
        case np.ndarray():
            return one.ctypes
        case _:
            return byref(one)


@cache
def _lapack() -> _Lapack | None:
    """The LAPACK that numpy computes with, unless it has none that can be called."""
    if sys.byteorder != "little":
        return None
    try:
        # a library's names are looked for in those that it is linked with, too
        library = CDLL(np.linalg._umath_linalg.__file__)  # type: ignore[attr-defined]
    except (AttributeError, OSError):
        return None
    return next((_Lapack(library, name) for name in _NAMES if _works(_Lapack(library, name))), None)


def _works(found: _Lapack) -> bool:
    values = np.full(3, 2.0)
    try:
        found.call("dsterf", 3, values, np.ones(2))
        known = all(found.has(name) for name in ("dsytrd", "dstemr", "dstedc", "dormtr"))
    except (AttributeError, np.linalg.LinAlgError):
        return False
    return known and np.allclose(values, 2 + np.sqrt(2) * np.array([-1, 0, 1]))
