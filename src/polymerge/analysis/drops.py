"""The cost of each knockout, in points, with confidence intervals, and its distribution over thirds of the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from polymerge.analysis.baseline import THIRDS, third_of
from polymerge.analysis.replacements import Cell
from polymerge.analysis.task_scores import Interval, Score, interval, resampled

__all__ = ["Drop", "Drops", "Third", "Thirds", "drops", "thirds"]

_UNDEFINED = 0.025  # of the resamples; with more of them a percentile interval has no ends
Floats = Any


@dataclass(frozen=True)
class Drop:
    """Points by which a score drops, with an interval that holds 95 % of the resamples; None if there is none."""

    drop: float
    interval: Interval | None


@dataclass(frozen=True)
class Third:
    """The drops of the cells in one third of the layers: sum, mean, and share of the sum of all drops.

    None if there is no cell; shares also if the sum of all drops is not positive.
    """

    cells: int
    drop: float
    mean: float | None
    mean_interval: Interval | None
    share: float | None
    share_interval: Interval | None


@dataclass(frozen=True)
class Thirds:
    """The distribution of a module's drops on a task.

    drop       sum over all cells
    undefined  share of the resamples in which that sum is not positive, so that shares are undefined
    """

    drop: float
    interval: Interval | None
    undefined: float | None
    early: Third
    middle: Third
    late: Third


@dataclass(frozen=True)
class Drops:
    """The drop of the score from the baseline's for each cell knocked out, in points.

    values     float64 [cell]
    resampled  float64 [resample, cell], on prompts drawn with replacement; None if prompts have no scores
    """

    values: Floats
    resampled: Floats | None

    def __sub__(self, other: Drops) -> Drops:
        if self.resampled is None or other.resampled is None:
            return Drops(self.values - other.values, None)
        return Drops(self.values - other.values, self.resampled - other.resampled)

    def cell(self, place: int) -> tuple[float, Interval | None]:
        """The drop of one cell and its interval."""
        return float(self.values[place]), interval(None if self.resampled is None else self.resampled[:, place])


def drops(baseline: Score, cells: Sequence[Score], task: str, seed: int) -> Drops:
    """The drops of all cells of a model on a task."""
    import numpy as np

    drawn = resampled([baseline, *cells], task, seed)
    values = baseline.score - np.array([one.score for one in cells], np.float64)
    return Drops(values, None if drawn is None else drawn[:, :1] - drawn[:, 1:])


def thirds(found: Drops, cells: Sequence[Cell], depth: int) -> Thirds:
    """The distribution of drops: their sum, mean and share of all drops in each third of the layers.

    A cell belongs to the third that contains the midpoint of its layers. The shares add up to 1; they are None if
    the total drop is not positive, and their intervals are None if that happens in more than 2.5 % of the
    resamples.
    """
    total = float(found.values.sum())
    again = None if found.resampled is None else found.resampled.sum(axis=1)
    undefined = None if again is None else float((again <= 0).mean())
    sure = undefined is not None and undefined <= _UNDEFINED
    told = {}
    for third in THIRDS:
        places = [place for place, cell in enumerate(cells) if third_of(cell.layers, depth) == third]
        own = float(found.values[places].sum())
        drawn = None if found.resampled is None else found.resampled[:, places].sum(axis=1)
        count = len(places)
        shares = None
        if sure and drawn is not None and again is not None and (again > 0).any():
            shares = interval(drawn[again > 0] / again[again > 0])
        told[third] = Third(
            cells=count,
            drop=own,
            mean=own / count if count else None,
            mean_interval=interval(drawn / count) if count and drawn is not None else None,
            share=own / total if total > 0 else None,
            share_interval=shares if total > 0 else None,
        )
    return Thirds(total, interval(again), undefined, **told)
