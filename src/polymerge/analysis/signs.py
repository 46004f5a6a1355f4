"""Entrywise statistics of deltas, summed in an order that does not depend on blocks or threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from polymerge.engine.cutoffs import RunAll, Source, exact_cutoffs
from polymerge.methods import kernels
from polymerge.methods.kernels import CELL
from polymerge.methods.kernels.compiled import compiled
from polymerge.methods.ties import kept as kept_of

__all__ = ["Sums", "added", "sums_of"]

Wide = NDArray[np.float64]
Counts = NDArray[np.int64]


class Whole(Source, Protocol):
    """Deltas in blocks that start at multiples of `CELL`, and the total number of entries per model."""

    count: int


@dataclass(frozen=True)
class Sums:
    """Sums over the entries of tensors, from which all shares and cosines follow.

    entries     number per model
    dots        [model, model]  dot products of the deltas
    mass        [model]         sums of magnitudes
    kept_power  [model]         sums of squares of the entries that a density keeps; `power` of all entries
    kept        [model]         their number; zero entries are never kept
    met         [model, model]  entries at which two deltas are both nonzero; `opposed` those with opposite signs
    cancelled   [model, model]  sums of the smaller of the two magnitudes, over the opposed ones
    common      [model, model]  entries that both keep; `common_opposed` those with opposite signs
    any_met, any_opposed, any_cancelled   the same of all models together: entries at which at least two deltas are not
                zero, those of them with both signs, and the smaller of the two signs' masses there
    """

    entries: int
    dots: Wide
    mass: Wide
    power: Wide
    kept_power: Wide
    kept: Counts
    met: Counts
    opposed: Counts
    cancelled: Wide
    common: Counts
    common_opposed: Counts
    any_met: int
    any_opposed: int
    any_cancelled: float


def added(parts: Sequence[Sums]) -> Sums:
    """The combined sums of several tensors, for the same models."""
    columns = {name: [vars(part)[name] for part in parts] for name in vars(parts[0])}
    return Sums(**{name: _added(column) for name, column in columns.items()})


def _added(column: Sequence[Any]) -> Any:
    """Sums of numbers or of arrays; those of floats are exact and then rounded once."""
    if isinstance(column[0], int):
        return sum(column)
    if isinstance(column[0], float):
        return fsum(column)
    stacked = np.stack(column)
    return stacked.sum(axis=0) if stacked.dtype == np.int64 else _exact_sum(stacked)


def _exact_sum(stacked: Wide) -> Wide:
    """Sums over the first dimension, exact and rounded once."""
    lines = stacked.reshape(len(stacked), -1).T
    return np.array([fsum(line) for line in lines], np.float64).reshape(stacked.shape[1:])


def sums_of(source: Whole, density: float, run_all: RunAll) -> Sums:
    """Compute the sums of one tensor's deltas, in two passes: find what a density keeps, then sum.

    density  share of the entries that are kept of each delta, those of the largest magnitude; see
             `polymerge.methods.ties.kept`
    run_all  maps over blocks
    """

    def look(index: int) -> tuple[Wide, Wide, Wide, Counts, Counts, Counts]:
        rows = source.read(index)
        models, n = rows.shape
        cells = -(-n // CELL)
        own, cross, all_ = np.zeros((cells, models, 2)), np.zeros((cells, models, models)), np.zeros(cells)
        kept, pairs, whole = np.zeros(models, np.int64), np.zeros((models, models, 4), np.int64), np.zeros(2, np.int64)
        for cell in range(cells):
            part = rows[:, cell * CELL : (cell + 1) * CELL]
            all_[cell] = _count(part, cutoffs, own[cell], cross[cell], kept, pairs, whole)
        return own, np.stack([cross, kernels.dots(rows)], axis=-1), all_, kept, pairs, whole

    models = len(source.read(0))
    cutoffs = np.array(exact_cutoffs(source, kept_of(density, models, source.count), run_all))
    blocks = list(zip(*run_all(look, range(len(source.sizes))), strict=True))
    own, cross, all_ = (_exact_sum(np.concatenate(cells)) for cells in blocks[:3])
    kept, pairs, whole = (np.stack(counts).sum(axis=0) for counts in blocks[3:])
    pairs = pairs + pairs.transpose(1, 0, 2)  # counted for the upper triangle
    dots = cross[..., 1]
    return Sums(
        source.count, dots, own[:, 0], np.diag(dots), own[:, 1], kept, pairs[..., 0], pairs[..., 1],
        cross[..., 0] + cross[..., 0].T, pairs[..., 2], pairs[..., 3], int(whole[0]), int(whole[1]), float(all_),
    )  # fmt: skip


@compiled
def _count(
    rows: Any,
    cutoffs: Wide,
    own: Wide,
    cross: Wide,
    kept: Counts,
    pairs: Counts,
    whole: Counts,
) -> float:
    """Accumulate one cell; returns the cancelled mass over all models."""
    models = rows.shape[0]
    value, sign, keeps = np.empty(models), np.empty(models, np.int64), np.empty(models, np.int64)
    cancelled = 0.0
    for k in range(rows.shape[1]):
        plus = minus = 0.0
        pluses: Any = 0
        minuses: Any = 0
        for i in range(models):
            number = np.float64(rows[i, k])
            magnitude = abs(number)
            up, down = np.int64(number > 0), np.int64(number < 0)
            keep = np.int64((magnitude >= cutoffs[i]) & (magnitude > 0))
            value[i], sign[i], keeps[i] = magnitude, up - down, keep
            plus += magnitude * up
            minus += magnitude * down
            pluses += up
            minuses += down
            own[i, 0] += magnitude
            own[i, 1] += magnitude * magnitude * keep
            kept[i] += keep
        both_signs = np.int64((pluses > 0) & (minuses > 0))
        whole[0] += np.int64(pluses + minuses > 1)
        whole[1] += both_signs
        cancelled += min(plus, minus)
        for i in range(models):
            for j in range(i + 1, models):
                product = sign[i] * sign[j]
                opposed = np.int64(product < 0)
                both = keeps[i] & keeps[j]
                pairs[i, j, 0] += np.int64(product != 0)
                pairs[i, j, 1] += opposed
                pairs[i, j, 2] += both
                pairs[i, j, 3] += both & opposed
                cross[i, j] += min(value[i], value[j]) * opposed
    return cancelled
