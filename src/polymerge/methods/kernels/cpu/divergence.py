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

LOG2E: Final = 1 / math.log(2)
LN2_HIGH: Final = float.fromhex("0x1.62e42fee00000p-1")  # so few digits that a product with an exponent is exact
LN2_LOW: Final = float.fromhex("0x1.a39ef35793c76p-33")
SQRT2: Final = math.sqrt(2)
EXP: Final = tuple(1 / math.factorial(n) for n in range(13, -1, -1))
LOG: Final = tuple(1 / n for n in range(25, 0, -2))
"""Coefficients, the highest first: of e^r for |r| <= ln(2)/2, and of atanh(s)/s in s^2 for |s| <= (sqrt(2) - 1)^2."""

LEAST: Final = -700.0
"""Below it the exponential is taken as 0."""

POWERS: Final = np.ldexp(1.0, np.arange(-1011, 1))
"""Powers of two, up to 1."""


def divergences(base: Floats, deltas: Floats, width: int) -> NDArray[np.float64]:
    """See `polymerge.methods.kernels.divergences`."""
    found = np.empty((len(deltas), base.size // width), np.float64)
    for delta, out in zip(deltas, found, strict=True):
        _divergences(base, delta, np.empty(width), np.empty(width), np.empty(LANES), np.empty(LANES), out)
    return found


def scored(deltas: Floats, per_row: NDArray[np.float64], width: int) -> Floats:
    """See `polymerge.methods.kernels.scored`."""
    rows = np.abs(deltas).reshape(len(deltas), -1, width)
    rows *= per_row.astype(deltas.dtype)[:, :, None]
    return rows.reshape(deltas.shape)


@compiled
def _exp(x: float) -> Any:
    """e^x for x <= 0."""
    if x < LEAST:
        return 0.0
    power = math.floor(x * LOG2E + 0.5)
    rest = (x - power * LN2_HIGH) - power * LN2_LOW
    total = EXP[0]
    for factor in EXP[1:]:
        total = total * rest + factor
    return total * POWERS[int(power) + POWERS.size - 1]


@compiled
def _log(x: float) -> Any:
    """The natural logarithm of a positive number."""
    bits = np.float64(x).view(np.int64)
    power = np.float64((bits >> 52) - 1023)
    part = np.int64((bits & ((1 << 52) - 1)) | (1023 << 52)).view(np.float64)
    if part > SQRT2:
        part = part * 0.5
        power = power + 1.0
    s = (part - 1.0) / (part + 1.0)
    square = s * s
    total = LOG[0]
    for factor in LOG[1:]:
        total = total * square + factor
    return power * LN2_HIGH + (power * LN2_LOW + 2.0 * s * total)


@compiled
def _divergences(
    base: Floats,
    delta: Floats,
    ours: NDArray[np.float64],
    theirs: NDArray[np.float64],
    lanes: NDArray[np.float64],
    others: NDArray[np.float64],
    out: NDArray[np.float64],
) -> None:
    width, count = ours.size, lanes.size
    for row in range(out.size):
        top, other_top = -np.inf, -np.inf
        for i in range(width):
            theirs[i] = np.float64(number(base[row * width + i]))
            ours[i] = theirs[i] + np.float64(delta[row * width + i])
            top, other_top = max(top, ours[i]), max(other_top, theirs[i])
        lanes[:] = 0.0
        others[:] = 0.0
        for i in range(width):
            ours[i], theirs[i] = _exp(ours[i] - top), _exp(theirs[i] - other_top)
            lanes[i % count] += ours[i]
            others[i % count] += theirs[i]
        total, other_total = fold(lanes), fold(others)
        lanes[:] = 0.0
        for i in range(width):
            own = ours[i] / total + FLOOR
            lanes[i % count] += own * _log(own / (theirs[i] / other_total + FLOOR))
        out[row] = max(fold(lanes), 0.0)
