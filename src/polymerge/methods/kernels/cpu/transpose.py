"""Matrices turned over in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from polymerge.methods.kernels.compiled import compiled

__all__ = ["turn"]

TILE = 32


@compiled
def turn(x: NDArray[Any], out: NDArray[Any]) -> None:
    """Write the transpose of a matrix, in tiles that are put together in a place of their own.

    Rows of matrices are often a power of two long, and so many of their starts fall on one line of the cache that a
    column read or written as it lies pushes itself out again.

    x    [n, m]
    out  [m, n], of the same dtype
    """
    n, m = x.shape
    tile = np.empty((TILE, TILE), x.dtype)
    for top in range(0, n, TILE):
        height = min(TILE, n - top)
        for left in range(0, m, TILE):
            width = min(TILE, m - left)
            for i in range(height):
                for j in range(width):
                    tile[i, j] = x[top + i, left + j]
            for j in range(width):
                for i in range(height):
                    out[left + j, top + i] = tile[i, j]
