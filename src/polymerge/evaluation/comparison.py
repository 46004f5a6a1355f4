"""Set models side by side: scores, averages over seen and unseen tasks, gains and how sure they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from polymerge.errors import RecipeError, collecting, did_you_mean, refuse
from polymerge.evaluation.bootstrap import RESAMPLES, SEED, Floats, interval, resampled_means
from polymerge.evaluation.mm_mergebench.tasks import TASKS
from polymerge.evaluation.results import Results, TaskResult, read_results

__all__ = ["Column", "Comparison", "Gain", "compare", "compare_files"]

_SAME = 1e-6  # percent by which the mean of samples may miss the score

_Pair = tuple[str, tuple[str, ...]]
"""A model, and those that it is compared with."""


@dataclass(frozen=True)
class Column:
    """A task, or the average of several."""

    name: str
    tasks: tuple[str, ...]

    @property
    def is_average(self) -> bool:
        """Whether it is one."""
        return self.tasks != (self.name,)


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


@dataclass(frozen=True)
class Comparison:
    """The table.

    scores  by model and column; None where a model lacks a score
    """

    models: tuple[str, ...]
    columns: tuple[Column, ...]
    scores: Mapping[tuple[str, str], float | None]
    gains: tuple[Gain, ...] = ()
    parents: tuple[str, ...] = ()
    template: str | None = None
    published: bool = False
    notes: tuple[str, ...] = ()
    settings: Mapping[str, float] = field(default_factory=dict)


def compare_files(
    files: Sequence[str | Path],
    *,
    parents: Sequence[str] = (),
    template: str | None = None,
    published: bool = False,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Comparison:
    """Compare what results files, or folders of runs, hold; several of one model are put together.

    raises Refused with everything that is wrong with files and names.
    """
    joined: dict[str, Results] = {}
    with collecting():
        read = [found for file in files if (found := read_results(Path(file).expanduser())) is not None]
        for found in read:
            before = joined.get(found.name)
            both = sorted(before.tasks.keys() & found.tasks.keys()) if before else []
            if both:
                refuse(
                    RecipeError(
                        f"two results of the model '{found.name}' have {', '.join(both)}. Leave one out, or "
                        "evaluate again under another name"
                    )
                )
            tasks = {**before.tasks, **found.tasks} if before else found.tasks
            joined[found.name] = msgspec.structs.replace(found, tasks=tasks)
        names = {"parents": parents, "template": [template] if template is not None else []}
        refuse(
            *(
                RecipeError(f"{option}: there are no results of '{one}'.{did_you_mean(one, joined)}")
                for option, said in names.items()
                for one in said
                if joined and one not in joined
            )
        )
        if resamples < 1:
            refuse(RecipeError(f"resamples: {resamples} are none"))
    return compare(
        list(joined.values()), parents=parents, template=template, published=published, resamples=resamples, seed=seed
    )


def compare(
    results: Sequence[Results],
    *,
    parents: Sequence[str] = (),
    template: str | None = None,
    published: bool = False,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Comparison:
    """Compare models whose names differ.

    parents    the models that others are merged of: gains are over the mean of their scores
    template   a model over which gains are told, too
    published  the scores of the published scripts, without intervals
    """
    models = tuple(found.name for found in results)
    by_name = {found.name: found for found in results}
    columns = _columns(results)
    scores = {
        (model, column.name): _mean([_score(by_name[model], task, published) for task in column.tasks])
        for model in models
        for column in columns
    }
    overs = [tuple(dict.fromkeys(parents))] if parents else []
    overs += [(template,)] if template is not None and (template,) not in overs else []
    pairs = [(model, over) for over in overs for model in models if model not in over and model not in parents]
    samples = _Samples(by_name, pairs, published, resamples, seed)
    gains = tuple(
        _gain(model, column, over, scores, samples)
        for model, over in pairs
        for column in columns
        if scores[model, column.name] is not None and all(scores[one, column.name] is not None for one in over)
    )
    notes = [
        f"{found.name}: {name}: {task.failed} of {task.total} questions have no answer and count as wrong"
        for found in results
        for name, task in found.tasks.items()
        if task.failed
    ]
    notes += [
        f"{found.name}: {name}: no score: {task.reason}"
        for found in results
        for name, task in found.tasks.items()
        if task.score is None and not published and task.reason
    ]
    return Comparison(
        models, columns, scores, gains, tuple(parents), template, published, tuple(notes),
        {"resamples": resamples, "seed": seed},
    )  # fmt: skip


def _columns(results: Sequence[Results]) -> tuple[Column, ...]:
    """Seen tasks and their average, unseen ones and theirs, then the others, averaged where there are two or more."""
    tasks: dict[str, TaskResult] = {}
    for found in results:
        tasks |= {name: task for name, task in found.tasks.items() if name not in tasks}
    usual = [*(name for name in TASKS if name in tasks), *(name for name in tasks if name not in TASKS)]
    columns: list[Column] = []
    for group, average in (("seen", "seen"), ("unseen", "unseen"), (None, "average")):
        named = tuple(name for name in usual if tasks[name].group == group)
        columns += [Column(name, (name,)) for name in named]
        comparable = all(found.tasks[name].unit == "%" for found in results for name in named if name in found.tasks)
        if len(named) > 1 and (group or comparable):
            columns.append(Column(average, named))
    return tuple(columns)


def _score(found: Results, task: str, published: bool) -> float | None:
    if task not in found.tasks:
        return None
    return found.tasks[task].as_published if published else found.tasks[task].score


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known and len(known) == len(scores) else None


def _gain(
    model: str,
    column: Column,
    over: tuple[str, ...],
    scores: Mapping[tuple[str, str], float | None],
    samples: _Samples,
) -> Gain:
    own, others = scores[model, column.name], _mean([scores[one, column.name] for one in over])
    assert own is not None
    assert others is not None
    found = [samples.means(task, model, over) for task in column.tasks]
    lacking = [one for one in found if isinstance(one, str)]
    if lacking:
        return Gain(model, column.name, over, own - others, reason=lacking[0])
    means = np.mean([one for one in found if not isinstance(one, str)], axis=0)
    rough = any(samples.are_rough(task, model, over) for task in column.tasks)
    return Gain(model, column.name, over, own - others, *interval(means), rough=rough)


class _Samples:
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
    """By how much the score is more than the mean over its questions."""
    if task.score is None or not task.samples:
        return 0.0
    return task.score - 100 * float(np.mean(list(task.samples.values())))
