"""Gains of models over others, with confidence intervals from the paired bootstrap.

Efron and Tibshirani 1993, chapter 13 (percentile interval). Questions are drawn with replacement, the same ones for
both models, and the difference of the means is recomputed each time. Questions are treated as independent; if several
share an image the intervals are somewhat too narrow.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from polymerge.evaluation.results import Results, TaskResult

__all__ = ["RESAMPLES", "SEED", "Gain", "Samples", "interval", "resampled_means"]

RESAMPLES, SEED, LEVEL = 10_000, 1, 0.95
_AT_ONCE = 2_000_000  # numbers in memory

_SAME = 1e-6  # percent by which the mean of samples may miss the score

Floats = NDArray[np.float64]
_Pair = tuple[str, tuple[str, ...]]
"""A model, and the models it is compared with."""


@dataclass(frozen=True)
class Gain:
    """The margin of a model over the mean of others, in the score's unit.

    over       the models it is compared with
    low, high  95 % interval; None if there is none, for the reason in `reason`
    rough      the score is a corpus-level one, as for captions, and the interval has the width of the one for
               the mean over single questions
    """

    model: str
    column: str
    over: tuple[str, ...]
    value: float
    low: float | None = None
    high: float | None = None
    rough: bool = False
    reason: str | None = None

    @property
    def within_noise(self) -> bool | None:
        """Whether the interval contains zero; None without an interval."""
        return None if self.low is None or self.high is None else self.low <= 0 <= self.high


class Samples:
    """Resampled gains by task; all models compared on a task share its resamples."""

    def __init__(
        self,
        results: Mapping[str, Results],
        pairs: Sequence[_Pair],
        published: bool,
        resamples: int,
        seed: int,
    ) -> None:
        self._results, self._pairs, self._published = results, pairs, published
        self._resamples, self._seed = resamples, seed
        self._of_task: dict[str, dict[_Pair, Floats | str]] = {}

    def means(self, task: str, model: str, over: tuple[str, ...]) -> Floats | str:
        """The resampled gains of a model in percent, or why there are none."""
        if task not in self._of_task:
            self._of_task[task] = self._drawn(task)
        return self._of_task[task][model, over]

    def are_rough(self, task: str, model: str, over: tuple[str, ...]) -> bool:
        """Return whether any of the scores is not a mean over questions."""
        return any(abs(_beside(self._results[name].tasks[task])) > _SAME for name in (model, *over))

    def _drawn(self, task: str) -> dict[_Pair, Floats | str]:
        found: dict[_Pair, Floats | str] = {}
        rows: dict[_Pair, Floats] = {}
        for model, over in self._pairs:
            row = self._differences(task, model, over)
            if isinstance(row, str):
                found[model, over] = row
            else:
                rows[model, over] = row
        for count in {len(row) for row in rows.values()}:
            alike = {pair: row for pair, row in rows.items() if len(row) == count}
            means = resampled_means(list(alike.values()), task, self._resamples, self._seed)
            found |= dict(zip(alike, means, strict=True))
        return found

    def _differences(self, task: str, model: str, over: tuple[str, ...]) -> Floats | str:
        if self._published:
            return "the published score is not made of samples"
        every = [self._results[name].tasks.get(task) for name in (model, *over)]
        for name, one in zip((model, *over), every, strict=True):
            if one is None or not one.samples:
                return f"{task}: {name} has no score for each question"
            if one.score is None or one.unit != "%":
                return f"{task}: the score is no share in percent"
        own, *others = [one.samples for one in every if one is not None and one.samples]
        for name, other in zip(over, others, strict=True):
            if other.keys() != own.keys():
                return f"{task}: {model} and {name} did not answer the same questions"
        mean = np.mean([[other[one] for one in own] for other in others], axis=0)
        gained: Floats = 100 * (np.array(list(own.values()), dtype=np.float64) - mean)
        first, *rest = [_beside(one) for one in every if one is not None]
        apart = first - sum(rest) / len(rest)
        return gained + apart if abs(apart) > _SAME else gained


def _beside(task: TaskResult) -> float:
    """The score minus the mean over its questions, in percent."""
    if task.score is None or not task.samples:
        return 0.0
    return task.score - 100 * float(np.mean(list(task.samples.values())))


def resampled_means(differences: Sequence[Floats], task: str, resamples: int = RESAMPLES, seed: int = SEED) -> Floats:
    """Resample questions and average per-question differences; all rows share the resamples.

    differences  [row][question]
    task         determines the draw together with the seed, independently of other tasks and models
    returns      [row, resample]
    """
    table = np.stack(list(differences))
    count = table.shape[1]
    dice = np.random.default_rng([seed, zlib.crc32(task.encode())])
    means = np.empty((len(table), resamples))
    rows = max(1, _AT_ONCE // count)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn = dice.integers(0, count, size=(size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        means[:, start : start + size] = table @ times.T / count
    return means


def interval(means: Floats, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of resampled means."""
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
