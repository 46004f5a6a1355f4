"""Select the entries of a delta to keep: the largest, or a random draw; the others become zero.

The largest are those at or above a cutoff, which is found by counting if a tensor is too large to be sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polymerge.methods.kernels.compiled import compiled

__all__ = ["count_around", "count_bins", "find_cutoffs", "keep_largest", "keep_random", "philox"]

Floats = NDArray[Any]

TILE = 4096
COUNTED = 128  # so few that most tiles hold nothing between close bounds, and are only counted


def find_cutoffs(deltas: Floats, keep: Sequence[int]) -> list[float]:
    """See `polymerge.methods.kernels.find_cutoffs`."""
    return [_find_cutoff(row, count) for row, count in zip(deltas, keep, strict=True)]


def _find_cutoff(row: Floats, count: int) -> float:
    if count <= 0:
        return inf
    if count >= row.size:
        return 0.0
    return float(np.partition(np.abs(row), row.size - count)[row.size - count])


def keep_largest(deltas: Floats, cutoffs: Sequence[float]) -> Floats:
    """See `polymerge.methods.kernels.keep_largest`."""
    for row, cutoff in zip(deltas, cutoffs, strict=True):
        _keep_largest(row, row.dtype.type(cutoff))
    return deltas


def keep_random(deltas: Floats, keys: Sequence[int], start: int, density: Sequence[float], rescale: bool) -> Floats:
    """See `polymerge.methods.kernels.keep_random`."""
    for row, key, share in zip(deltas, keys, density, strict=True):
        if share < 1:
            limit = int(share * 2**32)
            factor = row.dtype.type(1 / share if rescale and limit else 1)
            _keep_random(row, np.uint64(key), np.uint64(start), np.uint32(limit), factor)
    return deltas


@compiled
def _keep_largest(row: Floats, cutoff: Any) -> None:
    zero = row.dtype.type(0)
    for i in range(row.size):
        row[i] = row[i] if abs(row[i]) >= cutoff else zero


@compiled
def _keep_random(row: Floats, key: np.uint64, start: np.uint64, limit: np.uint32, factor: Any) -> None:
    zero = row.dtype.type(0)
    skip = np.int64(start % np.uint64(4))  # words of the first counter that belong to the block before
    counter = start // np.uint64(4)
    words = np.empty(TILE + 4, np.uint32)
    for place in range(0, row.size, TILE):
        tile = row[place : place + TILE]
        philox(counter + np.uint64(place // 4), key, words[: 4 * ((skip + tile.size + 3) // 4)])
        drawn = words[skip : skip + tile.size]
        for i in range(tile.size):
            tile[i] = tile[i] * factor if drawn[i] < limit else zero


LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
MULTIPLIER_0, MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL_0, WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


@compiled
def philox(counter: np.uint64, key: np.uint64, out: NDArray[np.uint32]) -> None:
    """Four random words for each of consecutive counters: Philox4x32 with ten rounds.

    Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3". The 32-bit words are kept in
    64-bit lanes whose upper halves are never cleared: a product reads the lower halves only, and so does the caller.
    """
    for block in range(out.size // 4):
        place = counter + np.uint64(block)
        a, b, c, d = place & LOW, place >> HALF, np.uint64(0), np.uint64(0)
        key_0, key_1 = key & LOW, key >> HALF
        for _ in range(10):
            product_0, product_1 = MULTIPLIER_0 * (a & LOW), MULTIPLIER_1 * (c & LOW)
            a, b, c, d = (product_1 >> HALF) ^ b ^ key_0, product_1, (product_0 >> HALF) ^ d ^ key_1, product_0
            key_0, key_1 = (key_0 + WEYL_0) & LOW, (key_1 + WEYL_1) & LOW
        out[4 * block] = a
        out[4 * block + 1] = b
        out[4 * block + 2] = c
        out[4 * block + 3] = d


@compiled
def count_around(row: Floats, low: Any, high: Any, between: Floats) -> tuple[int, int, int, int]:
    """Count the magnitudes above `high`, equal to it, strictly between and equal to `low`; gather those in between.

    row      [n]   deltas
    low      <= high, both of the row's dtype
    between  [n] or [0], output for the magnitudes in between, in order; if empty they are only counted
    returns  above, at_high, inside, at_low (inside and at_low are 0 where low == high)
    """
    above = at_high = inside = at_low = 0
    for start in range(0, row.size, COUNTED):
        tile = row[start : start + COUNTED]
        # counted in 32 bits: as wide as a float, so that one comparison fills one lane
        over_high = from_high = over_low = from_low = np.int32(0)
        for i in range(tile.size):
            magnitude = abs(tile[i])
            over_high = np.int32(over_high + np.int32(magnitude > high))
            from_high = np.int32(from_high + np.int32(magnitude >= high))
            over_low = np.int32(over_low + np.int32(magnitude > low))
            from_low = np.int32(from_low + np.int32(magnitude >= low))
        above += int(over_high)
        at_high += int(from_high - over_high)
        if low < high:
            at_low += int(from_low - over_low)
            if over_low > from_high and between.size > 0:
                place = np.uint64(inside)
                for i in range(tile.size):
                    magnitude = abs(tile[i])
                    between[place] = magnitude  # the next one takes its place unless it counts
                    place += np.uint64((magnitude > low) & (magnitude < high))
            inside += int(over_low - from_high)
    return above, at_high, inside, at_low


@compiled
def count_bins(bits: Any, low: Any, high: Any, shift: Any, bins: NDArray[np.int64]) -> None:
    """Add the magnitudes strictly between `low` and `high` to a histogram, by their bits.

    Without its sign a float's bits, read as an integer, are ordered as the magnitudes are.

    bits   [n] the row, viewed as unsigned integers; `low`, `high` and `shift` are of that type too
    bins   bin b counts the bits from low + (b << shift) on
    """
    one = bits.dtype.type(1)
    unsigned = bits.dtype.type((one << bits.dtype.type(8 * bits.itemsize - 1)) - one)
    for i in range(bits.size):
        magnitude = bits[i] & unsigned
        if low < magnitude < high:
            bins[np.int64((magnitude - low) >> shift)] += 1
