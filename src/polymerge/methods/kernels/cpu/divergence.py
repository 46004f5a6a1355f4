"""How far rows of two tensors are from each other as probabilities, and entries weighed by it.

Exponentials and logarithms are sums and products written out, as in `polymerge.methods.kernels.tensor`: those of a
library differ in the last place from one library, or processor, to the next, and a threshold would tell.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from polymerge.methods.kernels.compiled import compiled, number
from polymerge.methods.kernels.cpu.arithmetic import LANES, fold

__all__ = ["divergences", "scored"]

Floats = NDArray[Any]

FLOOR: Final = 1e-8
"""Added to every probability, as in mergekit."""

MOST: Final = 700.0
"""What exponents are taken as at least, without their sign; their exponentials are as good as zero."""
LOG2E: Final = 1 / math.log(2)
LN2_HIGH: Final = float.fromhex("0x1.62e42fee00000p-1")  # so few digits that a product with an exponent is exact
LN2_LOW: Final = float.fromhex("0x1.a39ef35793c76p-33")
SQRT2: Final = math.sqrt(2)
EXP: Final = tuple(1 / math.factorial(n) for n in range(11, -1, -1))
LOG: Final = tuple(1 / n for n in range(19, 0, -2))
"""Coefficients, the highest first: of e^r for |r| <= ln(2)/2, and of atanh(s)/s in s^2 for |s| <= (sqrt(2) - 1)^2."""

ROUNDING: Final = 1.5 * 2.0**52
"""A number is rounded to an integer by adding it, and the integer is then in its last bits."""
ROUNDING_BITS: Final = int(np.float64(ROUNDING).view(np.int64))
FRACTION: Final = (1 << 52) - 1
UNIT: Final = 1023 << 52  # the exponent of numbers from 1 to 2

TILE: Final = 512  # so that what is computed of one number after another stays in the first cache


def divergences(base: Floats, deltas: Floats, width: int) -> NDArray[np.float64]:
    """See `polymerge.methods.kernels.divergences`."""
    found = np.empty((len(deltas), base.size // width), np.float64)
    rows, tiles, lanes = np.empty((2, width)), np.empty((4, TILE)), np.empty((2, LANES))
    for delta, out in zip(deltas, found, strict=True):
        _divergences(base, delta, rows, tiles, lanes, out)
    return found


def scored(deltas: Floats, per_row: NDArray[np.float64], width: int) -> Floats:
    """See `polymerge.methods.kernels.scored`."""
    rows = np.abs(deltas).reshape(len(deltas), -1, width)
    with np.errstate(over="ignore"):
        rows *= per_row.astype(deltas.dtype)[:, :, None]
    np.minimum(rows, np.finfo(rows.dtype).max, out=rows)
    return rows.reshape(deltas.shape)


@compiled
def _exp(x: NDArray[np.float64], rest: NDArray[np.float64], power: NDArray[np.float64]) -> None:
    """e^x for x <= 0, in place; each operation goes over all numbers, so that it is done for several at once."""
    bits = power.view(np.int64)
    for i in range(x.size):
        x[i] = max(x[i], -MOST)
        power[i] = x[i] * LOG2E + ROUNDING
        whole = power[i] - ROUNDING
        rest[i] = (x[i] - whole * LN2_HIGH) - whole * LN2_LOW
        x[i] = EXP[0]
    for factor in EXP[1:]:
        for i in range(x.size):
            x[i] = x[i] * rest[i] + factor
    for i in range(x.size):
        bits[i] = (bits[i] + 1023) << 52
    for i in range(x.size):
        x[i] = x[i] * power[i]


@compiled
def _log(
    x: NDArray[np.float64], s: NDArray[np.float64], square: NDArray[np.float64], power: NDArray[np.float64]
) -> None:
    """The natural logarithm of positive numbers, in place."""
    bits, exponents = x.view(np.int64), power.view(np.int64)
    for i in range(x.size):
        exponents[i] = (bits[i] >> 52) - 1023 + ROUNDING_BITS
        bits[i] = (bits[i] & FRACTION) | UNIT
    for i in range(x.size):
        high = x[i] > SQRT2
        part = x[i] * 0.5 if high else x[i]
        power[i] = (power[i] - ROUNDING) + (1.0 if high else 0.0)
        s[i] = (part - 1.0) / (part + 1.0)
        square[i] = s[i] * s[i]
        x[i] = LOG[0]
    for factor in LOG[1:]:
        for i in range(x.size):
            x[i] = x[i] * square[i] + factor
    for i in range(x.size):
        x[i] = power[i] * LN2_HIGH + (power[i] * LN2_LOW + 2.0 * s[i] * x[i])


@compiled
def _divergences(
    base: Floats,
    delta: Floats,
    rows: NDArray[np.float64],
    tiles: NDArray[np.float64],
    lanes: NDArray[np.float64],
    out: NDArray[np.float64],
) -> None:
    width = rows.shape[1]
    ours, theirs = rows[0], rows[1]
    for row in range(out.size):
        own, other = base[row * width : (row + 1) * width], delta[row * width : (row + 1) * width]
        for i in range(width):
            theirs[i] = np.float64(number(own[i]))
            ours[i] = theirs[i] + np.float64(other[i])
        totals = _softmax(ours, tiles, lanes[0]), _softmax(theirs, tiles, lanes[1])
        sums = lanes[0]
        sums[:] = 0.0
        for start in range(0, width, TILE):
            size = min(TILE, width - start)
            p, q, ratio = ours[start : start + size], theirs[start : start + size], tiles[0, :size]
            for i in range(size):
                p[i] = p[i] / totals[0] + FLOOR
                ratio[i] = p[i] / (q[i] / totals[1] + FLOOR)
            _log(ratio, tiles[1, :size], tiles[2, :size], tiles[3, :size])
            place = start % sums.size
            part = sums[place : place + size]
            for i in range(size):
                part[i] += p[i] * ratio[i]
        out[row] = max(fold(sums), 0.0)


@compiled
def _softmax(row: NDArray[np.float64], tiles: NDArray[np.float64], sums: NDArray[np.float64]) -> Any:
    """Replace a row by its exponentials, the largest of which is 1; returns their sum."""
    top = -np.inf
    for i in range(row.size):
        top = max(top, row[i])
    sums[:] = 0.0
    for start in range(0, row.size, TILE):
        size = min(TILE, row.size - start)
        part = row[start : start + size]
        for i in range(size):
            part[i] = part[i] - top
        _exp(part, tiles[0, :size], tiles[1, :size])
        place = start % sums.size
        total = sums[place : place + size]
        for i in range(size):
            total[i] += part[i]
    return fold(sums)
