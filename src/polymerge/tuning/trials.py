"""A scored search over several parameters with one of Optuna's samplers, which learns from trial to trial."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from polymerge.errors import MissingExtraError, RecipeError
from polymerge.tuning.candidates import Point, Space

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

_NEEDS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({"cmaes": ("cmaes",), "gp": ("scipy", "torch")})

Trial = tuple[Point, float]


def run_trials(
    space: Space,
    sampler: str,
    count: int,
    objective: Callable[[Point], float],
    *,
    name: str,
    folder: Path,
    storage: str | None = None,
    seed: int = 2,
) -> list[Trial]:
    """Carry out trials until there are `count`, those of an earlier run of the same study among them.

    What a sampler draws depends on the trials that are complete and on the seed, and on nothing else, so that a search
    that was killed goes on as if it had not been.

    objective  the score of a point, which is to become large
    name       of the study; another one for anything that makes scores hard to compare
    folder     of the run; the study is kept in it, as Optuna's journal
    storage    URL of another of Optuna's storages, such as sqlite:///search.db

    raises MissingExtraError without Optuna, or what its sampler needs; RecipeError for a storage that cannot be opened.
    """
    optuna = _optuna(sampler)
    study = _study(optuna, storage, folder, name)
    states = optuna.trial.TrialState
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for frozen in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            # of a run that was stopped: it is carried out as it was drawn, for what comes after depends on it
            point = _point(frozen, space)
            study.tell(frozen.number, objective(point)) if point else study.tell(frozen.number, state=states.FAIL)
        while len(done := study.get_trials(deepcopy=False, states=(states.COMPLETE,))) < count:
            study.sampler = getattr(optuna.samplers, SAMPLERS[sampler])(seed=seed + len(done))
            trial = study.ask()
            point = tuple(_draw(trial, space, place) for place in range(len(space.knobs)))
            study.tell(trial, objective(point))
    points = [_point(trial, space) for trial in done[:count]]
    return [(point, float(trial.value)) for point, trial in zip(points, done, strict=False) if point is not None]


def _optuna(sampler: str) -> Any:
    for package in ("optuna", *_NEEDS.get(sampler, ())):
        if find_spec(package) is None:
            raise MissingExtraError(f"--sampler {sampler} needs {package}: pip install 'polymerge[optuna]'")
    optuna = import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _study(optuna: Any, storage: str | None, folder: Path, name: str) -> Any:
    if storage is None:
        backend = optuna.storages.journal.JournalFileBackend(str(folder / "optuna.journal"))
        kept: Any = optuna.storages.JournalStorage(backend)
        return optuna.create_study(storage=kept, study_name=name, direction="maximize", load_if_exists=True)
    try:
        return optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
    except Exception as error:  # whatever a database's driver raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"--storage {storage}: is none that Optuna can open: {reason}") from None


def _draw(trial: Any, space: Space, place: int) -> Any:
    name, span, listed = space.knobs[place].name, space.spans[place], space.values[place]
    if span is not None:
        return trial.suggest_float(name, *span)
    if _numeric(listed):
        # by place, so that a sampler knows their order and none is rounded
        return listed[trial.suggest_int(_by_place(name), 0, len(listed) - 1)]
    return trial.suggest_categorical(name, list(listed))


def _point(trial: Any, space: Space) -> Point | None:
    """The point that a trial drew; None where it was stopped before it had drawn all of it."""
    point = []
    for knob, span, listed in zip(space.knobs, space.spans, space.values, strict=True):
        by_place = span is None and _numeric(listed)
        drawn = trial.params.get(_by_place(knob.name) if by_place else knob.name)
        if drawn is None:
            return None
        point.append(listed[drawn] if by_place else drawn)
    return tuple(point)


def _numeric(listed: tuple[Any, ...]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in listed)


def _by_place(name: str) -> str:
    return f"{name} (place)"
