"""Sums over models, entry by entry, in recipe order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from polymerge.methods.kernels.compiled import compiled, number

__all__ = [
    "CELL", "LANES", "TILE", "add_scaled", "dots", "elected_sum", "fold", "magnitudes", "one_line", "subtract",
    "weighted_sum",
]  # fmt: skip

Floats = NDArray[Any]

CELL: Final = 65536
"""Elements that are summed in float64 in a fixed order; the cells' sums are then added exactly, on every device."""

LANES: Final = 1024
"""Running sums within a cell: lane i takes the elements i, i + LANES, i + 2 LANES, ... in this order."""

# A block is walked in tiles, so small that what is summed up stays in the processor's first cache while model after
# model is added. Each inner loop runs over slices cut before it starts: that is what the compiler can vectorise.
TILE = 1024


def subtract(x: Floats, base: Floats, out: Floats | None = None) -> Floats:
    """See `polymerge.methods.kernels.subtract`."""
    deltas = x if out is None else out
    _subtract(*one_line(x), base, *one_line(deltas))
    return deltas


def add_scaled(base: Floats, merged: Floats, scale: float) -> Floats:
    """See `polymerge.methods.kernels.add_scaled`."""
    _add_scaled(base, merged, merged.dtype.type(scale))
    return merged


def weighted_sum(x: Floats, weight: Sequence[float]) -> Floats:
    """See `polymerge.methods.kernels.weighted_sum`."""
    out = np.empty(x.shape[1], np.float32 if x.dtype == np.uint16 else x.dtype)
    with np.errstate(over="ignore"):  # what becomes infinite is counted where it is written
        weights = np.array(weight, out.dtype)
    _weighted_sum(*one_line(x), weights, out)
    return out


def elected_sum(deltas: Floats, weight: Sequence[float], elect: str, normalize: str) -> Floats:
    """See `polymerge.methods.kernels.elected_sum`."""
    out = np.empty(deltas.shape[1], deltas.dtype)
    share = np.array(weight, deltas.dtype)
    one = np.ones_like(share)
    say = share if elect == "weighted" else one
    part = share if normalize == "weight" else one
    two_or_many = _elected_sum_of_two if len(deltas) == 2 else _elected_sum
    two_or_many(*one_line(deltas), share, say, part, normalize != "none", out)
    return out


def dots(x: Floats, size: int = CELL) -> NDArray[np.float64]:
    """See `polymerge.methods.kernels.dots`."""
    models, n = x.shape
    cells = np.empty((-(-n // size), models, models), np.float64)
    _dots(*one_line(x), n, size, np.empty(LANES), cells)
    return cells


def magnitudes(x: Floats, size: int) -> NDArray[np.float64]:
    """See `polymerge.methods.kernels.magnitudes`."""
    cells = np.empty((-(-x.shape[1] // size), len(x)), np.float64)
    for model, row in enumerate(x):
        _magnitudes(row, size, np.empty(LANES), cells[:, model])
    return cells


def one_line(x: Floats) -> tuple[Floats, int]:
    """The rows as one contiguous array, and the stride between rows.

    Rows are often the first part of longer rows of a buffer. In a loop over such a [model, n] array the compiler has to
    expect gaps between neighbours and gives up vectorising; in a slice of the line it does not.
    """
    models, n = x.shape
    if x.flags.c_contiguous:
        return x.reshape(-1), n
    stride, rest = divmod(x.strides[0], x.itemsize)
    if x.strides[1] != x.itemsize or rest or stride < n:
        raise ValueError(f"rows of a block have to be contiguous, got strides {x.strides} of {x.dtype}")
    return np.lib.stride_tricks.as_strided(x, ((models - 1) * stride + n,), (x.itemsize,)), stride


@compiled
def _add_scaled(base: Floats, merged: Floats, scale: Any) -> None:
    for i in range(merged.size):
        merged[i] = number(base[i]) + scale * merged[i]


@compiled
def _subtract(line: Floats, stride: int, base: Floats, out: Floats, pitch: int) -> None:
    for start in range(0, base.size, TILE):
        origin = base[start : start + TILE]
        for model in range(-(-out.size // pitch)):
            row = line[model * stride + start : model * stride + start + origin.size]
            delta = out[model * pitch + start : model * pitch + start + origin.size]
            for i in range(delta.size):
                delta[i] = number(row[i]) - number(origin[i])


@compiled
def _weighted_sum(line: Floats, stride: int, weight: Floats, out: Floats) -> None:
    for start in range(0, out.size, TILE):
        total = out[start : start + TILE]
        row, share = line[start : start + total.size], weight[0]
        for i in range(row.size):
            total[i] = share * number(row[i])
        for model in range(1, weight.size):
            first = model * stride + start
            row, share = line[first : first + total.size], weight[model]
            for i in range(row.size):
                total[i] += share * number(row[i])


@compiled
def _elected_sum(
    line: Floats, stride: int, weight: Floats, say: Floats, part: Floats, divide: bool, out: Floats
) -> None:
    zero, one, tiny = out.dtype.type(0), out.dtype.type(1), out.dtype.type(1e-8)
    sign, parts = np.empty(TILE, out.dtype), np.empty(TILE, out.dtype)
    for start in range(0, out.size, TILE):
        total = out[start : start + TILE]
        row, vote = line[start : start + total.size], say[0]
        for i in range(row.size):
            sign[i] = vote * row[i]
        for model in range(1, weight.size):
            first = model * stride + start
            row, vote = line[first : first + total.size], say[model]
            for i in range(row.size):
                sign[i] += vote * row[i]
        for i in range(total.size):
            sign[i] = one if sign[i] >= zero else -one
            total[i] = zero
            parts[i] = zero
        for model in range(weight.size):
            first = model * stride + start
            row, vote = line[first : first + total.size], say[model]
            share, counts = weight[model], part[model]
            for i in range(row.size):
                agrees = vote * row[i] * sign[i] > zero
                total[i] += share * row[i] if agrees else zero
                parts[i] += counts if agrees else zero
        if divide:
            for i in range(total.size):
                total[i] /= parts[i] if abs(parts[i]) >= tiny else one


@compiled
def _elected_sum_of_two(
    line: Floats, stride: int, weight: Floats, say: Floats, part: Floats, divide: bool, out: Floats
) -> None:
    # the same sums for the commonest case, all in registers: more than twice as fast
    zero, one, tiny = out.dtype.type(0), out.dtype.type(1), out.dtype.type(1e-8)
    a, b = line[: out.size], line[stride : stride + out.size]
    share_a, share_b = weight[0], weight[1]
    say_a, say_b = say[0], say[1]
    part_a, part_b = part[0], part[1]
    if not divide:
        part_a = part_b = zero
    for i in range(out.size):
        vote_a, vote_b = say_a * a[i], say_b * b[i]
        sign = one if vote_a + vote_b >= zero else -one
        agrees_a, agrees_b = vote_a * sign > zero, vote_b * sign > zero
        total = zero + (share_a * a[i] if agrees_a else zero) + (share_b * b[i] if agrees_b else zero)
        parts = (part_a if agrees_a else zero) + (part_b if agrees_b else zero)
        out[i] = total / (parts if abs(parts) >= tiny else one)


@compiled
def _dots(line: Floats, stride: int, n: int, size: int, lanes: NDArray[np.float64], cells: NDArray[np.float64]) -> None:
    models = cells.shape[1]
    for cell in range(cells.shape[0]):
        for one in range(models):
            for other in range(one, models):
                lanes[:] = 0.0
                last = min(n, (cell + 1) * size)
                for start in range(cell * size, last, lanes.size):
                    end = min(start + lanes.size, last)
                    left = line[one * stride + start : one * stride + end]
                    right = line[other * stride + start : other * stride + end]
                    for i in range(left.size):
                        lanes[i] += np.float64(number(left[i])) * np.float64(number(right[i]))
                cells[cell, one, other] = fold(lanes)
                cells[cell, other, one] = lanes[0]


@compiled
def _magnitudes(row: Floats, size: int, lanes: NDArray[np.float64], cells: NDArray[np.float64]) -> None:
    for cell in range(cells.size):
        lanes[:] = 0.0
        last = min(row.size, (cell + 1) * size)
        for start in range(cell * size, last, lanes.size):
            part = row[start : min(start + lanes.size, last)]
            for i in range(part.size):
                lanes[i] += abs(np.float64(part[i]))
        cells[cell] = fold(lanes)


@compiled
def fold(lanes: NDArray[np.float64]) -> Any:
    """The sum of running sums, whose number is a power of two; overwrites them."""
    width = lanes.size
    while width > 1:  # fold the upper half onto the lower until one number is left
        width //= 2
        lower, upper = lanes[:width], lanes[width : 2 * width]
        for i in range(width):
            lower[i] += upper[i]
    return lanes[0]
