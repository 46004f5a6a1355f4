"""Products of thin factors, added where they belong."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from polymerge.methods.kernels.compiled import compiled

__all__ = ["add_low_rank"]

Floats = NDArray[Any]

TILE = 1024


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
