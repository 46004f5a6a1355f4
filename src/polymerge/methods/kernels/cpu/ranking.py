"""A random draw by the ranks of magnitudes in their rows.

A row is not sorted. Its magnitudes are counted in bins, by their leading bits, so that an entry's rank is known up to
the others of its bin; where these are all equal, as most differences of bfloat16 numbers are, it is known. Only where
the entry's word falls between what the first and the last rank of its bin ask for, the row is gone through once more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polymerge.methods.kernels.compiled import compiled
from polymerge.methods.kernels.cpu.trimming import philox

__all__ = ["chances", "keep_ranked"]

Floats = NDArray[Any]

OCTAVES, CROWDED = 16, 64
"""Powers of two, from the largest magnitude of a row down, whose bins are of their own; those below share one. A row
one of whose bins holds so many different ones, or that part of its entries, is sorted after all.
"""
FEWEST, MOST = 3, 12
"""Bits of a fraction by which magnitudes are told apart."""
TILE = 64
"""Entries that are looked at together."""


def keep_ranked(
    deltas: Floats,
    width: int,
    keys: Sequence[int],
    start: int,
    density: Sequence[float],
    epsilon: Sequence[float],
    factors: Sequence[float],
) -> Floats:
    """See `polymerge.methods.kernels.keep_ranked`."""
    leading = min(max((width // OCTAVES).bit_length() - 1, FEWEST), MOST)
    for row, key, share, away, factor in zip(deltas, keys, density, epsilon, factors, strict=True):
        low, step = chances(share, away, width)
        bits = row.view(f"u{row.itemsize}")
        _keep_ranked(row, bits, width, leading, np.uint64(key), np.uint64(start), low, step, row.dtype.type(factor))
    return deltas


def chances(density: float, epsilon: float, width: int) -> tuple[float, float]:
    """The least limit that an entry's word is compared with, and by how much it grows with each half of a rank."""
    if width == 1:
        return density * 2**32, 0.0
    return (density - epsilon) * 2**32, epsilon * 2**32 / (width - 1)


@compiled
def _keep_ranked(
    row: Floats,
    bits: Any,
    width: int,
    leading: int,
    key: np.uint64,
    start: np.uint64,
    low: float,
    step: float,
    factor: Any,
) -> None:
    kind = bits.dtype.type
    unsigned = kind((kind(1) << kind(8 * bits.itemsize - 1)) - kind(1))
    shift = kind((23 if bits.itemsize == 4 else 52) - leading)
    rest = kind((kind(1) << shift) - kind(1))
    size = (OCTAVES << leading) + 2
    counts, mixed = np.empty((2, size), np.int32), np.empty(size, np.uint8)
    surely, perhaps = np.empty(size, np.int64), np.empty(size, np.int64)
    bins, words, magnitudes = np.empty(width, np.uint32), np.empty(width + 8, np.uint32), np.empty(width, bits.dtype)
    kept, zero = np.empty(width, np.bool_), row.dtype.type(0)
    for begin in range(0, row.size, width):
        entries, stored, largest = row[begin : begin + width], bits[begin : begin + width], kind(0)
        for i in range(stored.size):
            magnitudes[i] = stored[i] & unsigned
            largest = max(largest, magnitudes[i])
        # the bins are 0 for zeros, 1 for all below the octaves, and from there on by leading bits
        below = np.int32(max(np.int64(largest >> shift) - np.int64(size - 2), np.int64(0)))
        for i in range(magnitudes.size):
            bins[i] = np.uint32(max(np.int32(magnitudes[i] >> shift) - below, np.int32(magnitudes[i] != 0)))
        counts[:] = 0
        for i in range(0, width - 1, 2):  # in two rows: neighbours are often equal, and would wait for each other
            counts[0, np.uint64(bins[i])] += np.int32(1)
            counts[1, np.uint64(bins[i + 1])] += np.int32(1)
        if width % 2:
            counts[0, np.uint64(bins[width - 1])] += np.int32(1)
        # a bin may hold different magnitudes where it is that of all below the octaves, or one has bits below its own
        mixed[:] = 0
        mixed[1] = 1
        for tile in range(0, width, TILE):
            part, found = magnitudes[tile : tile + TILE], kind(0)
            for i in range(part.size):
                found |= part[i] & rest
            if found != 0:
                for i in range(part.size):
                    mixed[np.uint64(bins[tile + i])] |= np.uint8((part[i] & rest) != 0)
        before, fullest = 0, 0
        for each in range(size):
            count = int(counts[0, each]) + int(counts[1, each])
            if count > 0:
                first = last = 2 * before + count - 1
                if mixed[each] and count > 1:
                    first, last = 2 * before, 2 * (before + count - 1)
                    fullest = max(fullest, count)
                surely[each], perhaps[each] = math.floor(low + step * first), math.floor(low + step * last)
                before += count
        place_of_word = start + np.uint64(begin)
        skip = np.int64(place_of_word % np.uint64(4))
        philox(place_of_word // np.uint64(4), key, words[: 4 * ((skip + width + 3) // 4)])
        ordered = np.sort(magnitudes) if fullest > max(CROWDED, width // CROWDED) else magnitudes[:0]
        for tile in range(0, width, TILE):
            drawn, places, takes = words[skip + tile : skip + width], bins[tile : tile + TILE], kept[tile : tile + TILE]
            undecided = False
            for i in range(places.size):
                word, place = np.int64(drawn[i]), np.uint64(places[i])
                takes[i] = word < surely[place]
                undecided |= (word >= surely[place]) & (word < perhaps[place])
            if undecided:
                for i in range(places.size):
                    word, place, magnitude = np.int64(drawn[i]), np.uint64(places[i]), magnitudes[tile + i]
                    if (word >= surely[place]) & (word < perhaps[place]):
                        twice = -1  # of the rank, which is from the number of smaller ones to that of others up to it
                        if ordered.size > 0:
                            twice += int(np.searchsorted(ordered, magnitude))
                            twice += int(np.searchsorted(ordered, magnitude, side="right"))
                        else:
                            for j in range(magnitudes.size):
                                twice += int(magnitudes[j] < magnitude) + int(magnitudes[j] <= magnitude)
                        takes[i] = word < math.floor(low + step * twice)
        for i in range(entries.size):
            entries[i] = entries[i] * factor if kept[i] else zero
