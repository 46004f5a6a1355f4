"""Counts of magnitudes, from which a threshold is found without sorting."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from polymerge.methods.kernels.compiled import compiled

__all__ = ["count_around", "count_bins"]

Floats = NDArray[Any]

TILE = 128  # so few that most tiles hold nothing between close bounds, and are only counted


@compiled
def count_around(row: Floats, low: Any, high: Any, between: Floats) -> tuple[int, int, int, int]:
    """Count the magnitudes above `high`, equal to it, strictly between and equal to `low`; gather those between.

    row      [n]   deltas
    low      <= high, both of the row's dtype
    between  [n] or [0], where the magnitudes between are written, in order; with no room they are only counted
    returns  above, at_high, inside, at_low (inside and at_low are 0 where low == high)
    """
    above = at_high = inside = at_low = 0
    for start in range(0, row.size, TILE):
        tile = row[start : start + TILE]
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
