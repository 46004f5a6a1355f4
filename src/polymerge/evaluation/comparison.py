"""Compare models: scores, averages over seen and unseen tasks, gains with confidence intervals."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from polymerge.charts import stacked
from polymerge.errors import RecipeError, collecting, did_you_mean, refuse
from polymerge.evaluation.comparison_plot import comparison_charts
from polymerge.evaluation.gains import RESAMPLES, SEED, Gain, Samples, interval
from polymerge.evaluation.mm_mergebench.tasks import TASKS
from polymerge.evaluation.results import Results, TaskResult, read_results
from polymerge.paths import given_path
from polymerge.tables import Table

if TYPE_CHECKING:
    import altair as alt

__all__ = ["Column", "Comparison", "compare", "compare_files"]


_MOST_RESAMPLES: Final = 1_000_000


@dataclass(frozen=True)
class Column:
    """A task, or the average of several tasks."""

    name: str
    tasks: tuple[str, ...]

    @property
    def is_average(self) -> bool:
        """Whether it is an average."""
        return self.tasks != (self.name,)


@dataclass(frozen=True)
class Comparison(Table):
    """The scores and gains of several models.

    scores  by model and column; None if a model lacks a score
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

    def rows(self) -> list[dict[str, Any]]:
        """One row per model, with its score in each column."""
        return [
            {"model": model, **{column.name: self.scores[model, column.name] for column in self.columns}}
            for model in self.models
        ]

    def charts(self) -> list[alt.LayerChart]:
        """The charts of the scores and of the gains."""
        names = [column.name for column in self.columns]
        scores = {model: [self.scores[model, name] for name in names] for model in self.models}
        return comparison_charts(names, scores, self.gains, published=self.published)

    def plot(self) -> alt.VConcatChart:
        """Draw the scores, and the gains with their intervals, as a chart of altair's.

        raises MissingExtraError without altair or vl-convert.
        """
        return stacked(self.charts())

    def to_json(self) -> dict[str, Any]:
        """All scores by model and column, the tasks of each average, all gains, and the notes."""
        return {
            "scores": {one.pop("model"): one for one in self.rows()},
            "averages": {column.name: list(column.tasks) for column in self.columns if column.is_average},
            "gains": [{**asdict(gain), "within_noise": gain.within_noise} for gain in self.gains],
            "parents": list(self.parents),
            "template": self.template,
            "as_published": self.published,
            "notes": list(self.notes),
            "settings": dict(self.settings),
        }


def compare_files(
    results: Sequence[str | os.PathLike[str] | Results] | str | os.PathLike[str] | Results,
    *,
    parents: Sequence[str] = (),
    template: str | None = None,
    published: bool = False,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Comparison:
    """Compare the results of models: scores, averages over seen and unseen tasks, gains with their intervals.

    results    what `evaluate` returned, folders of runs, or results.json files; several of one model are joined
    parents    names of the models that others are merged of: gains are over the mean of their scores
    template   the name of a model over which gains are told, too
    published  the scores of the published scripts, without intervals
    resamples  of the paired bootstrap; `seed` is that of its draws

    raises Refused with every problem of files and names.
    """
    joined: dict[str, Results] = {}
    with collecting():
        given = [results] if isinstance(results, str | os.PathLike | Results) else results
        read = [
            found
            for one in given
            if (found := one if isinstance(one, Results) else read_results(given_path(one))) is not None
        ]
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
        if not 1 <= resamples <= _MOST_RESAMPLES:
            refuse(RecipeError(f"resamples: {resamples} is not from 1 to {_MOST_RESAMPLES}"))
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
    """Compare the results of models with distinct names.

    parents    the models that others were merged from: gains are over the mean of their scores
    template   another model over which gains are computed
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
    samples = Samples(by_name, pairs, published, resamples, seed)
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
    """Seen tasks and their average, unseen tasks and theirs, then the others, with an average if there are several."""
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
    samples: Samples,
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
