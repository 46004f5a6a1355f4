"""Score answers with labels, over a grid or in trials of one of Optuna's samplers, which learns from each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from polymerge.errors import MissingExtraError, RecipeError, did_you_mean
from polymerge.evaluation.scorers import SCORERS
from polymerge.inference.prompts import Prompt
from polymerge.tuning.knobs import Axis
from polymerge.tuning.space import Point, Space

__all__ = ["SAMPLERS", "Scoring", "Trial", "check_labels", "run_trials", "score"]

SAMPLERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "random": "RandomSampler",
        "tpe": "TPESampler",
        "cmaes": "CmaEsSampler",
        "gp": "GPSampler",
        "nsgaii": "NSGAIISampler",
        "nsga2": "NSGAIISampler",
    }
)
"""Optuna's samplers by their names in a search."""

OF_ONE: Final = ("cmaes", "gp")
"""Samplers of one objective."""

POPULATION: Final = 10
"""Trials of a generation of NSGA-II where several tasks are scored."""

_NEEDS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({"cmaes": ("cmaes",), "gp": ("scipy", "torch")})

Trial = tuple[Point, tuple[float, ...]]
"""A point and its score on each task."""


@dataclass(frozen=True)
class Scoring:
    """How answers are scored with labels.

    scorer   a row of the table of scorers; of several tasks one for all, or one for each by its name
    sampler  grid (every combination of the listed values), or one of Optuna's
    trials   number of trials of a sampler
    storage  URL of one of Optuna's storages; by default a journal in the run's folder
    choose   whether to choose the best score; otherwise the criterion chooses, and scores are only reported
    rule     with several tasks: how one is chosen from their Pareto front, a row of `objectives.RULES`
    quick    with several tasks: number of prompts of each that every candidate is asked; those on the front are asked
             all. By default all at once
    population  trials of a generation of NSGA-II; by default Optuna's 50, and 10 with several tasks
    """

    scorer: str | Mapping[str, str]
    sampler: str = "grid"
    trials: int = 20
    storage: str | None = None
    choose: bool = True
    rule: str = "ideal"
    quick: int | None = None
    population: int | None = None

    def of(self, task: str) -> str:
        """The scorer of a task."""
        return self.scorer if isinstance(self.scorer, str) else self.scorer[task]


def check_labels(scorer: str, prompts: Sequence[Prompt]) -> None:
    """Refuse an unknown scorer, or prompts that it cannot score; raises RecipeError."""
    if scorer not in SCORERS:
        raise RecipeError(f"scorer: there is no scorer '{scorer}'.{did_you_mean(scorer, SCORERS)}")
    without = [prompt.id for prompt in prompts if prompt.answer is None]
    if without:
        raise RecipeError(
            f"scorer {scorer}: {len(without)} of {len(prompts)} prompts have no answer, the first of them "
            f"{without[0]!r}. A scored search needs the right answer of each prompt; leave `scorer` out to do without"
        )


def score(scorer: str, prompts: Sequence[Prompt], answers: Mapping[int | str, str]) -> float:
    """The score of a candidate's answers, in percent."""
    scored = SCORERS[scorer].score([answers[prompt.id] for prompt in prompts], [prompt.answer for prompt in prompts])
    return float(scored.score)


def run_trials(
    space: Space,
    scoring: Scoring,
    objective: Callable[[Point], float | Sequence[float]],
    *,
    name: str,
    folder: Path,
    seed: int = 2,
    tasks: int = 1,
) -> list[Trial]:
    """Run trials until there are as many as requested, including those of an earlier run of the same study.

    A sampler's draws depend only on the completed trials and the seed, so that a search
    that was killed continues as if uninterrupted.

    objective  the score of a point, to be maximised, or its score on each of several tasks
    name       of the study; scores that are not comparable need different names
    folder     of the run; the study is stored in it, as Optuna's journal, unless there is another storage
    tasks      number of tasks

    raises MissingExtraError without Optuna or a sampler's dependency; RecipeError for a storage that cannot be opened.
    """
    optuna = _optuna(scoring.sampler)
    study = _study(optuna, scoring.storage, folder, name, tasks)
    of_sampler: dict[str, Any] = {"population_size": scoring.population} if scoring.population else {}
    states = optuna.trial.TrialState
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for frozen in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            # of a run that was stopped: it is carried out as it was drawn, for what comes after depends on it
            point = _point(frozen, space)
            study.tell(frozen.number, objective(point)) if point else study.tell(frozen.number, state=states.FAIL)
        while len(done := study.get_trials(deepcopy=False, states=(states.COMPLETE,))) < scoring.trials:
            study.sampler = getattr(optuna.samplers, SAMPLERS[scoring.sampler])(seed=seed + len(done), **of_sampler)
            trial = study.ask()
            point = tuple(_draw(trial, axis) for axis in space.axes)
            study.tell(trial, objective(point))
    points = [_point(trial, space) for trial in done[: scoring.trials]]
    return [(point, tuple(trial.values)) for point, trial in zip(points, done, strict=False) if point is not None]


def _optuna(sampler: str) -> Any:
    for package in ("optuna", *_NEEDS.get(sampler, ())):
        if find_spec(package) is None:
            raise MissingExtraError(f"sampler {sampler} needs {package}: pip install 'polymerge[optuna]'")
    optuna = import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _study(optuna: Any, storage: str | None, folder: Path, name: str, tasks: int) -> Any:
    said: dict[str, Any] = {"study_name": name, "directions": ["maximize"] * tasks, "load_if_exists": True}
    if storage is None:
        backend = optuna.storages.journal.JournalFileBackend(str(folder / "optuna.journal"))
        kept: Any = optuna.storages.JournalStorage(backend)
        return optuna.create_study(storage=kept, **said)
    try:
        return optuna.create_study(storage=storage, **said)
    except Exception as error:  # whatever a database's driver raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"storage {storage}: is none that Optuna can open: {reason}") from None


def _draw(trial: Any, axis: Axis) -> Any:
    if axis.span is not None:
        return trial.suggest_float(axis.name, *axis.span)
    if axis.numeric:
        # by place, so that a sampler knows their order and none is rounded
        return axis.values[trial.suggest_int(_by_place(axis), 0, len(axis.values) - 1)]
    return trial.suggest_categorical(axis.name, list(axis.values))


def _point(trial: Any, space: Space) -> Point | None:
    """The point that a trial drew; None if it was interrupted before it was complete."""
    point = []
    for axis in space.axes:
        by_place = axis.span is None and axis.numeric
        drawn = trial.params.get(_by_place(axis) if by_place else axis.name)
        if drawn is None:
            return None
        point.append(axis.values[drawn] if by_place else drawn)
    return tuple(point)


def _by_place(axis: Axis) -> str:
    return f"{axis.name} (place)"
