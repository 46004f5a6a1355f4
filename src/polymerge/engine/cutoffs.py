"""Exact cutoffs of deltas that are never in memory all at once, and are never sorted.

To keep the k largest of n magnitudes, and all that equal the smallest of them, one has to know the k-th, the cutoff. A
sample gives two bounds that the cutoff probably lies between. One pass over the blocks counts what is above the bounds,
between them and equal to them (deltas of bfloat16 weights take few different values, so the bounds themselves are often
shared by many), and gathers what is between, which is little. If the cutoff is not there after all, or too much is, the
pass has still told on which side to look, and further passes halve the bits in question, by histogram, until it is
found. The sample decides only how many passes there are: what is found is exact, so it depends neither on the blocks
nor on the threads.

What a pass finds are whole numbers and a set of magnitudes, so that parts of the blocks can be looked through apart,
even on other machines (`look_through`), and what they found be put together (`joined`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import ceil, floor, inf, sqrt
from threading import Lock
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from polymerge.methods.kernels import find_cutoffs, on_host
from polymerge.methods.kernels.cpu.trimming import count_around, count_bins

__all__ = ["Found", "Look", "RunAll", "Source", "Window", "exact_cutoffs", "joined", "look_through"]

Floats: TypeAlias = NDArray[Any]

RunAll: TypeAlias = Callable[[Callable[[int], Any], Iterable[int]], Iterable[Any]]
"""Calls a function for every index, in any order and on any thread; returns the results in index order."""

GATHERED: Final = 1 << 25
"""Maximum bytes of magnitudes held, for all models together; twice that while they are ranked."""

SAMPLED: Final = 1 << 16
"""Number of magnitudes in a model's sample."""

DEVIATIONS: Final = 3.5
"""Distance of the bounds from the sample's estimate of the cutoff, in standard deviations."""


class Source(Protocol):
    """Deltas in blocks.

    sizes   elements of each block
    """

    sizes: Sequence[int]

    def read(self, index: int) -> Any:
        """The deltas [model, sizes[index]] of a block, in one dtype for all blocks; valid until this thread's next
        read.
        """


class Window(NamedTuple):
    """What a pass looks for in a row of the deltas.

    model      the row
    low, high  the bounds
    room       the number of magnitudes between them that may be gathered
    shift      None to gather them; else they are counted, in bins of 2**shift values in the order of their bits
    """

    model: int
    low: Any
    high: Any
    room: int
    shift: int | None


class Found(NamedTuple):
    """What a pass finds for a window: see `count_around`; `between` is empty if there is no room for what is inside."""

    above: int
    at_high: int
    inside: int
    at_low: int
    between: Floats
    bins: NDArray[np.int64] | None


Look: TypeAlias = Callable[[Sequence[Window]], Sequence[Found]]
"""One pass over all blocks."""


def exact_cutoffs(
    source: Source,
    keep: Sequence[int],
    run_all: RunAll,
    models: Sequence[int] | None = None,
    look: Look | None = None,
) -> list[float]:
    """Find every model's `keep[model]`-th largest magnitude, or several of some models.

    source   the blocks; each is read about once, some twice, however many cutoffs are asked for
    keep     [cutoff]
    run_all  maps over blocks
    models   [cutoff] the model that each is of; by default one of each
    look     looks through the blocks; by default they are read here. A sample of them is in any case
    returns  [cutoff] infinity to keep nothing, zero to keep everything
    raises   ValueError if a delta is NaN
    """
    n = sum(source.sizes)
    if len(source.sizes) == 1 and n <= 4 * SAMPLED:  # to rank all of it costs less than a search
        return find_cutoffs(source.read(0) if models is None else source.read(0)[[*models]], keep)
    cutoffs = [inf if count <= 0 else 0.0 for count in keep]
    places = [place for place, count in enumerate(keep) if 0 < count < n]
    rows = [place if models is None else models[place] for place in places]
    searches = _searches(_sample(source, rows, run_all), rows, places, keep, n) if places else []
    while searches:
        windows = [search.window for search in searches]
        found = look_through(source, windows, run_all) if look is None else look(windows)
        results = [(search, search.conclude(one)) for search, one in zip(searches, found, strict=True)]
        for search, cutoff in results:
            if cutoff is not None:
                cutoffs[search.place] = float(cutoff)
        searches = [search for search, cutoff in results if cutoff is None]
    return cutoffs


def look_through(source: Source, windows: Sequence[Window], run_all: RunAll) -> list[Found]:
    """One pass over the blocks of a source: what there is for each window."""
    watches = [_Watch(window) for window in windows]

    def look(index: int) -> list[Found]:
        rows = on_host(source.read(index))
        return [watch.look(rows[watch.window.model]) for watch in watches]

    blocks = [*zip(*run_all(look, range(len(source.sizes))), strict=True)]
    return [joined(of)._replace(bins=watch.bins) for watch, of in zip(watches, blocks, strict=True)]


def joined(parts: Sequence[Found]) -> Found:
    """What the parts of a pass have found for one window together."""
    bins = [part.bins for part in parts if part.bins is not None]
    return Found(
        sum(part.above for part in parts),
        sum(part.at_high for part in parts),
        sum(part.inside for part in parts),
        sum(part.at_low for part in parts),
        np.concatenate([part.between for part in parts]),
        np.sum(bins, axis=0) if bins else None,
    )


class _Watch:
    """A window during one pass, for any number of threads."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.bins = None if window.shift is None else np.zeros(1 << 16, np.int64)
        self._lock, self._gathered = Lock(), 0

    def look(self, row: Floats) -> Found:
        """Examine one block's deltas; their bins are added up in `bins`."""
        _, low, high, room, shift = self.window
        between = np.empty(row.size if shift is None and self._gathered <= room else 0, row.dtype)
        above, at_high, inside, at_low = count_around(row, low, high, between)
        with self._lock:
            self._gathered += inside
        if self.bins is not None and shift is not None and inside:
            bits, own = row.view(f"u{row.itemsize}"), np.zeros_like(self.bins)
            kind = bits.dtype.type
            count_bins(bits, kind(_bits(low)), kind(_bits(high)), kind(shift), own)
            with self._lock:
                self.bins += own
        return Found(above, at_high, inside, at_low, between[:inside].copy(), None)


class _Search:
    """The search for the cutoff at `place` of all: the `keep`-th largest of `n` of a model, probably in [low, high].

    Values between the bounds are gathered, or counted in bins if they are expected to exceed the memory limit.
    """

    def __init__(
        self, model: int, place: int, keep: int, n: int, room: int, low: Any, high: Any, expected: float
    ) -> None:
        self.place, self.keep, self.n = place, keep, n
        self.window = Window(model, low, high, room, None)
        self._set_bounds(low, high, expected)

    def _set_bounds(self, low: Any, high: Any, expected: float) -> None:
        shift = max((_bits(high) - _bits(low)).bit_length() - 16, 0) if expected > self.window.room else None
        self.window = self.window._replace(low=low, high=high, shift=shift)

    def conclude(self, found: Found) -> Any:
        """The cutoff, if a pass has found it; otherwise None, with new bounds for another pass."""
        above, at_high, inside, at_low, between, bins = found
        _, low, high, _, shift = self.window
        kind = type(low)
        rank = self.keep - above  # of the cutoff among what is not above
        if rank <= 0:
            self._set_bounds(high, kind(inf), above)
        elif rank <= at_high:
            return high
        elif rank <= at_high + inside:
            if between.size == inside:
                place = inside + at_high - rank
                between.partition(place)
                return between[place]
            if bins is not None and shift is not None:
                self._open_bin(bins, shift, rank - at_high)
            else:  # more than the sample had promised
                self._set_bounds(low, high, inside)
        elif rank <= at_high + inside + at_low:
            return low
        elif low == 0:
            raise ValueError(f"NaN among the deltas of model {self.window.model}")
        else:
            self._set_bounds(kind(0), low, self.n - above - at_high - inside - at_low)
        return None

    def _open_bin(self, bins: NDArray[np.int64], shift: int, rank: int) -> None:
        """Narrow the search to the bin that holds the cutoff."""
        chosen = bins.size - 1 - int(np.searchsorted(np.cumsum(bins[::-1]), rank))
        kind, first = type(self.window.low), _bits(self.window.low) + (chosen << shift)
        last = min(first + (1 << shift) - 1, _bits(self.window.high))
        self._set_bounds(_float(first, kind), _float(last, kind), bins[chosen] if last > first else 0)


def _bits(magnitude: Any) -> int:
    return int(magnitude.view(f"u{magnitude.itemsize}"))


def _float(bits: int, kind: type[np.floating[Any]]) -> Any:
    return np.array(bits, f"u{np.dtype(kind).itemsize}").view(kind)[()]


def _sample(source: Source, models: Sequence[int], run_all: RunAll) -> list[Floats]:
    """Magnitudes [model, some] from a few evenly spread blocks."""
    blocks = [index for index, size in enumerate(source.sizes) if size]
    count = min(max(len(blocks) // 16, 2), 64, len(blocks))
    chosen = [blocks[(2 * place + 1) * len(blocks) // (2 * count)] for place in range(count)]
    step = max(sum(source.sizes[index] for index in chosen) // SAMPLED, 1) | 1  # odd: not always the same columns

    def look(index: int) -> Floats:
        magnitudes: Floats = np.abs(on_host(source.read(index))[models, ::step])
        return magnitudes

    return list(run_all(look, chosen))


def _searches(
    sample: Sequence[Floats], rows: Sequence[int], places: Sequence[int], keep: Sequence[int], n: int
) -> list[_Search]:
    room = GATHERED // (len(places) * sample[0].itemsize)
    searches = []
    for number, (model, place) in enumerate(zip(rows, places, strict=True)):
        low, high, inside = _bounds([part[number] for part in sample], keep[place] / n)
        # a fifth more than in the sample, for it may be a little off
        searches.append(_Search(model, place, keep[place], n, room, low, high, 1.2 * inside * n))
    return searches


def _bounds(parts: Sequence[Floats], share: float) -> tuple[Any, Any, float]:
    """Bounds that probably enclose the magnitude with `share` of all above it, and the share of all between them."""
    magnitudes = np.sort(np.concatenate(parts))
    size = magnitudes.size
    kind = magnitudes.dtype.type
    guess = magnitudes[min(size - 1, floor((1 - share) * size))]
    # blocks may differ from each other by more than chance: so may then the sample from the whole
    spread = np.std([np.mean(part >= guess) for part in parts]) / sqrt(len(parts))
    margin = DEVIATIONS * max(float(spread), sqrt(share * (1 - share) / size)) + 1 / size
    down, up = floor((1 - share - margin) * size), ceil((1 - share + margin) * size)
    low = magnitudes[down] if down >= 0 else kind(0)
    high = magnitudes[up] if up < size else kind(inf)
    inside = np.searchsorted(magnitudes, high, "left") - np.searchsorted(magnitudes, low, "right")
    return low, high, max(int(inside), 0) / size
