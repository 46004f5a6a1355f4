"""Statistics over more than one block: cutoffs, dot products, keys of random draws."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from math import fsum, isfinite
from typing import Any, Final, NamedTuple

import numpy as np

from polymerge.engine.blocks import Block, PieceBlocks
from polymerge.engine.cutoffs import SAMPLED, Look, RunAll, Source, exact_cutoffs
from polymerge.methods import kernels
from polymerge.methods.breadcrumbs import Band, ranks
from polymerge.methods.consensus import Selected, outlying, quartiles
from polymerge.methods.della import norms, rescaling_of, spread
from polymerge.methods.kernels import on_host
from polymerge.methods.ties import kept

__all__ = ["STATISTICS", "Deltas", "Statistic", "added_up", "cutoffs", "dot_products", "draw_keys", "gram"]


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


def cutoffs(source: Source, said: Mapping[str, Any], run_all: RunAll, look: Look | None = None) -> list[float]:
    """Each model's cutoff for its `density` in what is said; `look` as for `exact_cutoffs`."""
    return exact_cutoffs(source, kept(said["density"], len(said["density"]), sum(source.sizes)), run_all, look=look)


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
        self._of_rows: dict[int, Any] = {}  # divergences, which take long and are few

    def read(self, index: int) -> Any:
        """The importances of a block, [3, n]."""
        block = self._source.read_block(index)
        if index not in self._of_rows:
            self._of_rows[index] = kernels.divergences(block.base, block.models, self._width)
        scores = kernels.scored(block.models, self._of_rows[index], self._width)[0]
        return np.broadcast_to(scores, (3, len(scores))) if isinstance(scores, np.ndarray) else scores.expand(3, -1)


class _Scores:
    """The variances over the models as a source of their own, with a single row."""

    def __init__(self, source: Source) -> None:
        self._source, self.sizes = source, source.sizes

    def read(self, index: int) -> Any:
        """The variances of a block, [1, n]."""
        return kernels.variances(self._source.read(index))


STATISTICS: Final[Mapping[str, Statistic]] = {
    "cutoff": Statistic(cutoffs),
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
    return added_up(_cells(pieces, run_all))


def dot_products(pieces: Sequence[PieceBlocks], run_all: RunAll) -> list[np.ndarray]:
    """The dot products over some of the pieces, as a few terms [model, model] whose sum is exact.

    `added_up` gives, of the terms of all pieces, the same numbers as `gram` of the pieces together.
    """
    cells = _cells(pieces, run_all)
    exact = [[_terms([cell[i, j] for cell in cells]) for j in range(len(cells[0]))] for i in range(len(cells[0]))]
    most = max(len(terms) for row in exact for terms in row)
    filled = np.array([[terms + [0.0] * (most - len(terms)) for terms in row] for row in exact], np.float64)
    return [filled[:, :, term] for term in range(most)]


def added_up(terms: Sequence[np.ndarray]) -> np.ndarray:
    """The sum of terms [model, model], rounded once."""
    models = range(len(terms[0]))
    return np.array([[fsum(term[i, j] for term in terms) for j in models] for i in models], np.float64)


def _cells(pieces: Sequence[PieceBlocks], run_all: RunAll) -> list[np.ndarray]:
    joined = Deltas(pieces)
    blocks = run_all(lambda index: kernels.dots(joined.read(index)), range(len(joined.sizes)))
    return [cell for block in blocks for cell in block]


def _terms(numbers: Sequence[float]) -> list[float]:
    """A few numbers that have the exact sum of many: what it rounds to, what is missing then, and so on."""
    terms: list[float] = []
    while (term := fsum([*numbers, *(-one for one in terms)])) and isfinite(term):
        terms.append(term)
    return [*terms, term]


def draw_keys(seed: int, places: Sequence[int], canonical: str) -> list[int]:
    """A 64-bit key for each model's random draws on one tensor.

    It depends only on the seed, the model's index in the recipe and the tensor's canonical name.
    """
    digests = [hashlib.sha256(f"{seed}\0{place}\0{canonical}".encode()).digest() for place in places]
    return [int.from_bytes(digest[:8], "little") for digest in digests]
