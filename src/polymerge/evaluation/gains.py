"""Gains and what they are made of: the differences between models at every question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from polymerge.evaluation.bootstrap import Floats, resampled_means
from polymerge.evaluation.results import Results, TaskResult

__all__ = ["Gain", "Samples"]

_SAME = 1e-6  # percent by which the mean of samples may miss the score

_Pair = tuple[str, tuple[str, ...]]
"""A model, and those that it is compared with."""


@dataclass(frozen=True)
class Gain:
    """By how much a model is better than the mean of some others, in the score's unit.

    over       those that it is compared with
    low, high  95 % interval; None where there is none, and `reason` says why
    rough      the score is one of the whole set, as those of captions are, and the interval has the width of that of
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
        """Whether the interval holds zero; None where there is none."""
        return None if self.low is None or self.high is None else self.low <= 0 <= self.high


class Samples:
    """Resampled gains by task, drawn once for all models that are compared at it."""

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
        """Whether one of the scores is no mean over questions."""
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
            if one is None or one.samples is None:
                return f"{task}: {name} has no score for each question"
            if one.score is None or one.unit != "%":
                return f"{task}: the score is no share in percent"
        own, *others = [one.samples for one in every if one is not None and one.samples is not None]
        for name, other in zip(over, others, strict=True):
            if other.keys() != own.keys():
                return f"{task}: {model} and {name} did not answer the same questions"
        mean = np.mean([[other[one] for one in own] for other in others], axis=0)
        gained: Floats = 100 * (np.array(list(own.values()), dtype=np.float64) - mean)
        first, *rest = [_beside(one) for one in every if one is not None]
        apart = first - sum(rest) / len(rest)
        return gained + apart if abs(apart) > _SAME else gained


def _beside(task: TaskResult) -> float:
    """By how much the score is more than the mean over its questions."""
    if task.score is None or not task.samples:
        return 0.0
    return task.score - 100 * float(np.mean(list(task.samples.values())))
