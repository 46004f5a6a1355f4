"""A scored search over several parameters with one of Optuna's samplers, which learns from trial to trial."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from polymerge.errors import MissingExtraError, RecipeError
from polymerge.search.candidates import Point, Space

__all__ = ["SAMPLERS", "Trial", "run_trials"]

SAMPLERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "random": "RandomSampler",
        "tpe": "TPESampler",
        "cmaes": "CmaEsSampler",
        "gp": "GPSampler",
        "nsgaii": "NSGAIISampler",
    }
)
"""Optuna's samplers by the name that --sampler takes."""

Trial = tuple[Point, float]


def run_trials(
    space: Space,
    sampler: str,
    count: int,
    objective: Callable[[Point], float],
    *,
    folder: Path,
    storage: str | None = None,
    seed: int = 2,
) -> list[Trial]:
    """Carry out trials until there are `count`, those of an earlier run of the same study among them.

    What a sampler draws depends on the trials that are complete and on the seed, and on nothing else, so that a search
    that was killed goes on as if it had not been.

    objective  the score of a point, which is to become large
    folder     of the run; the study is kept in it, as Optuna's journal
    storage    URL of another of Optuna's storages, such as sqlite:///search.db

    raises MissingExtraError without Optuna.
    """
    optuna: Any
    try:
        optuna = import_module("optuna")
    except ImportError:
        raise MissingExtraError(f"--sampler {sampler} needs Optuna: pip install 'polymerge[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kept: Any = storage or optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(folder / "optuna.journal"))
    )
    study = optuna.create_study(storage=kept, study_name="polymerge", direction="maximize", load_if_exists=True)
    states = optuna.trial.TrialState
    for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        study.tell(trial.number, state=states.FAIL)  # of a run that was stopped; its answers are still there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        while len(done := study.get_trials(deepcopy=False, states=(states.COMPLETE,))) < count:
            study.sampler = _sampler(optuna, sampler, seed + len(done))
            trial = study.ask()
            point = tuple(_draw(trial, space, place) for place in range(len(space.knobs)))
            study.tell(trial, objective(point))
    return [(_point(trial, space), float(trial.value)) for trial in done[:count]]


def _sampler(optuna: Any, name: str, seed: int) -> Any:
    try:
        return getattr(optuna.samplers, SAMPLERS[name])(seed=seed)
    except ImportError as error:
        raise MissingExtraError(f"--sampler {name} needs a package beside Optuna: {error}") from None


def _draw(trial: Any, space: Space, place: int) -> Any:
    name, span, listed = space.knobs[place].name, space.spans[place], space.values[place]
    if span is not None:
        return trial.suggest_float(name, *span)
    if _numeric(listed):
        # by place, so that a sampler knows their order and none is rounded
        return listed[trial.suggest_int(_by_place(name), 0, len(listed) - 1)]
    return trial.suggest_categorical(name, list(listed))


def _point(trial: Any, space: Space) -> Point:
    point = []
    for knob, span, listed in zip(space.knobs, space.spans, space.values, strict=True):
        try:
            if span is None and _numeric(listed):
                point.append(listed[trial.params[_by_place(knob.name)]])
            else:
                point.append(trial.params[knob.name])
        except (KeyError, IndexError):
            raise RecipeError(
                f"trial {trial.number} of the study has no such {knob.name}: it is of another search. Name another "
                "folder or storage"
            ) from None
    return tuple(point)


def _numeric(listed: tuple[Any, ...]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in listed)


def _by_place(name: str) -> str:
    return f"{name} (place)"
