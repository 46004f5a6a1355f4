"""Matrices: addition of low-rank products, multiplication by scales of blocks, and transposes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from polymerge.methods.kernels.compiled import compiled

__all__ = ["add_low_rank", "times_scales", "transpose"]

Floats = NDArray[Any]

TILE = 1024  # elements of a row that a product is summed up for at a time
SIDE = 32  # of the squares that a transpose is put together from


def add_low_rank(out: Floats, left: Floats, right: Floats, scale: float, first: int) -> None:
    """See `polymerge.methods.kernels.add_low_rank`."""
    _add_low_rank(out, left, right, out.dtype.type(scale), first)


@compiled
def _add_low_rank(out: Floats, left: Floats, right: Floats, scale: Any, first: int) -> None:
    width = right.shape[1]
    total = np.empty(TILE, out.dtype)
    done = 0
    while done < out.size:
        row, column = divmod(first + done, width)
        part = out[done : done + min(TILE, width - column)]
        for i in range(part.size):
            total[i] = 0
        for k in range(right.shape[0]):
            share, line = left[row, k], right[k, column : column + part.size]
            for i in range(part.size):
                total[i] += share * line[i]
        for i in range(part.size):
            part[i] += scale * total[i]
        done += part.size


def times_scales(out: Floats, scales: Floats, block: tuple[int, int], width: int, first: int) -> bool:
    """See `polymerge.methods.kernels.times_scales`."""
    return bool(_times_scales(out, np.ascontiguousarray(scales), *block, width, first))


@compiled
def _times_scales(out: Floats, scales: Floats, height: int, breadth: int, width: int, first: int) -> bool:
    carries, done = np.uint32(0), 0
    while done < out.size:
        row, column = divmod(first + done, width)
        end = done + min(width - column, breadth - column % breadth)
        part, scale = out[done:end], scales[row // height, column // breadth]
        for i in range(part.size):
            product = np.float32(part[i] * scale)
            part[i] = product
            carries |= (product.view(np.uint32) & np.uint32(0x7F800000)) + np.uint32(0x00800000)  # as in `formats`
        done += part.size
    return bool(carries < np.uint32(0x80000000))


@compiled
def transpose(x: NDArray[Any], out: NDArray[Any]) -> None:
    """Write the transpose of a matrix, in tiles that are copied through a buffer.

    Rows of matrices are often a power of two long, so that many of them begin at one line of the cache: a column that
    is read or written directly evicts itself.

    x    [n, m]
    out  [m, n], of the same dtype
    """
    n, m = x.shape
    tile = np.empty((SIDE, SIDE), x.dtype)
    for top in range(0, n, SIDE):
        height = min(SIDE, n - top)
        for left in range(0, m, SIDE):
            width = min(SIDE, m - left)
            for i in range(height):
                for j in range(width):
                    tile[i, j] = x[top + i, left + j]
            for j in range(width):
                for i in range(height):
                    out[left + j, top + i] = tile[i, j]
