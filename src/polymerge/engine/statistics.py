"""Statistics over more than one block: exact cutoffs, dot products, keys of random draws.

Cutoffs are of deltas that are never in memory all at once, and are never sorted. To keep the k largest of n magnitudes,
and all that equal the smallest of them, one has to know the k-th, the cutoff. A sample gives two bounds that the cutoff
probably lies between. One pass over the blocks counts what is above the bounds, between them and equal to them (deltas
of bfloat16 weights take few different values, so the bounds themselves are often shared by many), and gathers what is
between, which is little. If the cutoff is not there after all, or too much is, the pass has still told on which side to
look, and further passes halve the bits in question, by histogram, until it is found. The sample decides only how many
passes there are: what is found is exact, so it depends neither on the blocks nor on the threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from math import ceil, floor, fsum, inf, sqrt
from threading import Lock
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from polymerge.engine.blocks import Block, PieceBlocks
from polymerge.methods import kernels
from polymerge.methods.breadcrumbs import Band, ranks
from polymerge.methods.consensus import Selected, importances, outlying, quartiles
from polymerge.methods.della import norms, rescaling_of, spread
from polymerge.methods.kernels import find_cutoffs, on_host
from polymerge.methods.kernels.cpu.trimming import count_around, count_bins
from polymerge.methods.ties import kept

__all__ = ["STATISTICS", "Deltas", "RunAll", "Source", "Statistic", "draw_keys", "exact_cutoffs", "gram"]

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


class Deltas:
    """The blocks of several pieces, concatenated as if they were one tensor."""

    def __init__(self, pieces: Sequence[PieceBlocks]) -> None:
        self._places = [(piece, index) for piece in pieces for index in range(len(piece.sizes))]
        self.sizes: Sequence[int] = [size for piece in pieces for size in piece.sizes]

    def read(self, index: int) -> Any:
        """The deltas of a block."""
        return self.read_block(index).models

    def read_block(self, index: int) -> Block:
        """The deltas of a block, with the base's numbers."""
        piece, own = self._places[index]
        return piece.read(own)


class Statistic(NamedTuple):
    """How to compute what a method needs beyond its block, from all blocks of a tensor.

    compute   from the blocks, what it depends on by name (`polymerge.methods.method.READS`), and what maps over blocks
    in_cells  whether blocks have to start at multiples of `CELL`, over which sums are taken
    """

    compute: Callable[[Any, Mapping[str, Any], RunAll], Any]
    in_cells: bool = False


def _cutoff(source: Source, said: Mapping[str, Any], run_all: RunAll) -> list[float]:
    return exact_cutoffs(source, kept(said["density"], len(said["density"]), sum(source.sizes)), run_all)


def _band(source: Source, said: Mapping[str, Any], run_all: RunAll) -> list[Band]:
    wanted = ranks(said["density"], said["gamma"], len(said["density"]), sum(source.sizes))
    ends = [*(one.last for one in wanted), *(one.first for one in wanted)]
    found = exact_cutoffs(source, ends, run_all, 2 * [*range(len(wanted))])
    lows, highs = found[: len(wanted)], found[len(wanted) :]
    return [one.band(low, high) for one, low, high in zip(wanted, lows, highs, strict=True)]


def _overlap(source: Source, said: Mapping[str, Any], run_all: RunAll) -> Any:
    counts = run_all(lambda index: kernels.count_shared(source.read(index), said["epsilon"]), range(len(source.sizes)))
    return sum(counts)


def _selected(source: Source, said: Mapping[str, Any], run_all: RunAll) -> Selected:
    indices = range(len(source.sizes))
    least = 0.0
    if said["select_topk"] < 1:
        scores = _Scores(source)
        varied = sum(run_all(lambda index: int(np.count_nonzero(on_host(scores.read(index)))), indices))
        (least,) = exact_cutoffs(scores, [int(varied * said["select_topk"])], run_all)

    def squares(index: int) -> Any:
        deltas = source.read(index)
        if least > 0:
            kernels.keep_scored(deltas, kernels.variances(deltas)[0], least)
        return [kernels.dots(deltas[model : model + 1]).reshape(-1) for model in range(len(deltas))]

    total = sum(source.sizes)
    of_models = zip(*run_all(squares, indices), strict=True)
    return Selected(least, [fsum(cell for cells in blocks for cell in cells) / total for blocks in of_models])


def _rescaling(source: Source, said: Mapping[str, Any], run_all: RunAll) -> list[float]:
    keys, width = said["keys"], said["width"]
    means, away = spread(said["density"], said["epsilon"], len(keys))
    if not said["rescale"] or min(means) == 1:
        return [1.0] * len(keys)
    starts = list(accumulate(source.sizes, initial=0))
    return rescaling_of(
        run_all(
            lambda index: norms(source.read(index), width, keys, starts[index], means, away), range(len(source.sizes))
        )
    )


def _importance(source: Deltas, said: Mapping[str, Any], run_all: RunAll) -> float:
    scores, places = _Importances(source, said["width"]), quartiles(sum(source.sizes))
    if scores.count <= SAMPLED:
        blocks = run_all(lambda index: on_host(scores.read(index))[0].copy(), range(len(source.sizes)))
        ordered = np.sort(np.concatenate(list(blocks)))
        return outlying([float(ordered[place]) for place in places])
    return outlying(exact_cutoffs(scores, [scores.count - place for place in places], run_all))


class _Importances:
    """The importances of entries as a source of their own: three rows that are the same, one for each quartile."""

    def __init__(self, source: Deltas, width: int) -> None:
        self._source, self._width, self.sizes, self.count = source, width, source.sizes, sum(source.sizes)

    def read(self, index: int) -> Any:
        """The importances of a block, [3, n]."""
        block = self._source.read_block(index)
        scores = importances(block.models, block.base, self._width)[0]
        return np.broadcast_to(scores, (3, len(scores))) if isinstance(scores, np.ndarray) else scores.expand(3, -1)


class _Scores:
    """The variances over the models as a source of their own, with a single row."""

    def __init__(self, source: Source) -> None:
        self._source, self.sizes = source, source.sizes

    def read(self, index: int) -> Any:
        """The variances of a block, [1, n]."""
        return kernels.variances(self._source.read(index))


STATISTICS: Final[Mapping[str, Statistic]] = {
    "cutoff": Statistic(_cutoff),
    "band": Statistic(_band),
    "overlap": Statistic(_overlap),
    "selected": Statistic(_selected, in_cells=True),
    "rescaling": Statistic(_rescaling),
    "importance": Statistic(_importance),
}
"""By the keyword that a method takes it under; `gram`, which may be of more than a tensor, is computed by `gram`."""


def gram(pieces: Sequence[PieceBlocks], run_all: RunAll) -> np.ndarray:
    """The models' dot products over all of the pieces together, float64 [model, model].

    Blocks of a piece must start at multiples of `CELL`, over which sums are taken in a fixed order; sums over
    cells are exact, so the result does not depend on the blocks.
    """
    joined = Deltas(pieces)
    blocks = run_all(lambda index: kernels.dots(joined.read(index)), range(len(joined.sizes)))
    cells = [cell for block in blocks for cell in block]
    models = range(len(cells[0]))
    return np.array([[fsum(cell[i, j] for cell in cells) for j in models] for i in models], np.float64)


def draw_keys(seed: int, places: Sequence[int], canonical: str) -> list[int]:
    """A 64-bit key for each model's random draws on one tensor.

    It depends only on the seed, the model's index in the recipe and the tensor's canonical name.
    """
    digests = [hashlib.sha256(f"{seed}\0{place}\0{canonical}".encode()).digest() for place in places]
    return [int.from_bytes(digest[:8], "little") for digest in digests]


def exact_cutoffs(
    source: Source, keep: Sequence[int], run_all: RunAll, models: Sequence[int] | None = None
) -> list[float]:
    """Find every model's `keep[model]`-th largest magnitude, or several of some models.

    source   the blocks; each is read about once, some twice, however many cutoffs are asked for
    keep     [cutoff]
    run_all  maps over blocks
    models   [cutoff] the model that each is of; by default one of each
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
        results = list(zip(searches, _one_pass(source, searches, run_all), strict=True))
        for search, found in results:
            if found is not None:
                cutoffs[search.place] = float(found)
        searches = [search for search, found in results if found is None]
    return cutoffs


def _one_pass(source: Source, searches: Sequence[_Search], run_all: RunAll) -> list[Any]:
    def look(index: int) -> list[_Tally]:
        rows = on_host(source.read(index))
        return [search.look(rows[search.model]) for search in searches]

    blocks = list(run_all(look, range(len(source.sizes))))
    return [search.conclude([block[place] for block in blocks]) for place, search in enumerate(searches)]


class _Tally(NamedTuple):
    """The counts of a pass over one block of one model: see `count_around`."""

    above: int
    at_high: int
    inside: int
    at_low: int
    between: Floats


class _Search:
    """The search for the cutoff at `place` of all: the `keep`-th largest of `n` of a model, probably in [low, high].

    Values between the bounds are gathered, or counted in bins if they are expected to exceed the memory limit.
    """

    def __init__(
        self, model: int, place: int, keep: int, n: int, room: int, low: Any, high: Any, expected: float
    ) -> None:
        self.model, self.place, self.keep, self.n, self.room = model, place, keep, n, room
        self._lock = Lock()
        self._set_bounds(low, high, expected)

    def _set_bounds(self, low: Any, high: Any, expected: float) -> None:
        self._low, self._high, self._gathered = low, high, 0
        # each bin is one value, or a run of 2**shift values, in the order of their bits
        self._shift = max((_bits(high) - _bits(low)).bit_length() - 16, 0)
        self._bins = np.zeros(1 << 16, np.int64) if expected > self.room else None

    def look(self, row: Floats) -> _Tally:
        """Examine one block's deltas; thread-safe."""
        gathers = self._bins is None and self._gathered <= self.room
        between = np.empty(row.size if gathers else 0, row.dtype)
        above, at_high, inside, at_low = count_around(row, self._low, self._high, between)
        with self._lock:
            self._gathered += inside
        if self._bins is not None and inside:
            bits, own = row.view(f"u{row.itemsize}"), np.zeros_like(self._bins)
            low, high, shift = (bits.dtype.type(part) for part in (_bits(self._low), _bits(self._high), self._shift))
            count_bins(bits, low, high, shift, own)
            with self._lock:
                self._bins += own
        return _Tally(above, at_high, inside, at_low, between[:inside].copy())

    def conclude(self, blocks: Sequence[_Tally]) -> Any:
        """The cutoff, if a pass has found it; otherwise None, with new bounds for another pass."""
        above, at_high = sum(block.above for block in blocks), sum(block.at_high for block in blocks)
        inside, at_low = sum(block.inside for block in blocks), sum(block.at_low for block in blocks)
        kind = type(self._low)
        rank = self.keep - above  # of the cutoff among what is not above
        if rank <= 0:
            self._set_bounds(self._high, kind(inf), above)
        elif rank <= at_high:
            return self._high
        elif rank <= at_high + inside:
            gathered = sum(block.between.size for block in blocks)
            if gathered == inside:
                magnitudes = np.concatenate([block.between for block in blocks])
                place = inside + at_high - rank
                magnitudes.partition(place)
                return magnitudes[place]
            if self._bins is not None:
                self._open_bin(self._bins, rank - at_high)
            else:  # more than the sample had promised
                self._set_bounds(self._low, self._high, inside)
        elif rank <= at_high + inside + at_low:
            return self._low
        elif self._low == 0:
            raise ValueError(f"NaN among the deltas of model {self.model}")
        else:
            self._set_bounds(kind(0), self._low, self.n - above - at_high - inside - at_low)
        return None

    def _open_bin(self, bins: NDArray[np.int64], rank: int) -> None:
        """Narrow the search to the bin that holds the cutoff."""
        chosen = bins.size - 1 - int(np.searchsorted(np.cumsum(bins[::-1]), rank))
        kind, first = type(self._low), _bits(self._low) + (chosen << self._shift)
        last = min(first + (1 << self._shift) - 1, _bits(self._high))
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
