"""The one format of results, whoever evaluated: `results.json`.

    {"format": "polymerge results", "version": 1, "tool": "polymerge", "model": {"name": ..., ...}, "settings": {...},
     "tasks": {"ScienceQA": {"group": "seen", "unit": "%", "score": 71.2, "as_published": 71.0, "right": 712,
                             "total": 1000, "failed": 0, "metrics": {...}, "settings": {...}, "notes": [...],
                             "samples": {"17": 1.0, "18": 0.0, ...}}}}

Nothing in it depends on when, where or by how many workers it was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from polymerge.errors import PolymergeError, RecipeError
from polymerge.evaluation.json_files import Broken, json_of, kind_of, shortened, text_of_file
from polymerge.evaluation.scoring import TaskScore

__all__ = ["FILE", "FORMAT", "VERSION", "Results", "TaskResult", "read_results", "task_result"]

FORMAT, VERSION = "polymerge results", 1
FILE = "results.json"

Numbers = Mapping[str, float | None]


@dataclass(frozen=True)
class TaskResult:
    """What a model is worth at a task.

    score         in `unit`; None where it could not be had, and `reason` says why
    unit          % where it is a share in percent, else points: the tool's own number, not to be averaged with others
    group         seen, unseen, or None for a task of no benchmark with such groups
    as_published  what the published script prints
    right, total  score times total / 100 where the unit is %; number of questions
    failed        of them, those that could not be asked or answered; they count as wrong
    samples       each question's share of right by its id; None where there are none
    metrics       further numbers
    settings      how it was asked
    """

    score: float | None
    unit: str = "%"
    group: str | None = None
    as_published: float | None = None
    right: float | None = None
    total: int = 0
    failed: int = 0
    reason: str | None = None
    samples: Mapping[str, float] | None = None
    metrics: Numbers = field(default_factory=dict)
    published_metrics: Numbers = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """A model's results.

    tool      polymerge, lmms-eval or vlmevalkit
    model     name, and what tells which model it is
    settings  of the whole run
    """

    tool: str
    model: Mapping[str, Any]
    tasks: Mapping[str, TaskResult]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What tables call the model."""
        return str(self.model["name"])

    def to_json(self) -> dict[str, Any]:
        """What results.json holds."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "tool": self.tool,
            "model": dict(self.model),
            "settings": dict(self.settings),
            "tasks": {name: asdict(task) for name, task in self.tasks.items()},
        }


def task_result(
    scored: TaskScore, group: str | None, failed: int, settings: Mapping[str, Any], folder: Path
) -> TaskResult:
    """The result that a score is.

    folder  of the run; notes name its files relative to it
    """
    return TaskResult(
        scored.score,
        group=group,
        as_published=scored.as_published,
        right=scored.right,
        total=scored.total,
        failed=failed,
        reason=scored.reason.replace(f"{folder}/", "") if scored.reason else None,
        samples=dict(zip(scored.ids, scored.samples, strict=True)) if scored.samples is not None else None,
        metrics=scored.metrics,
        published_metrics=scored.published_metrics,
        notes=tuple(note.replace(f"{folder}/", "") for note in scored.notes),
        settings=settings,
    )


def read_results(path: Path, problems: list[PolymergeError]) -> Results | None:
    """The results in a file, or in the folder of a run; None, with all that is wrong, where they cannot be read."""
    file = path / FILE if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        problems.append(RecipeError(f"{path}: has no {FILE}. Is it the folder of a finished `polymerge evaluate`?"))
        return None
    try:
        value = json_of(text_of_file(file))
    except Broken as error:
        problems.append(RecipeError(f"{file}: {error}. Evaluate again."))
        return None
    except RecipeError as error:
        problems.append(error)
        return None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        problems.append(RecipeError(f"{file}: is no results file of `polymerge evaluate`. Give its {FILE}"))
        return None
    if value.get("version") != VERSION:
        problems.append(
            RecipeError(f"{file}: is of version {value.get('version')!r} of the format, this polymerge reads {VERSION}")
        )
        return None
    wrong: list[str] = []
    model, tasks = value.get("model"), value.get("tasks")
    if not isinstance(model, dict) or not isinstance(model.get("name"), str) or not model["name"]:
        wrong.append("model has no name")
    if not isinstance(tasks, dict) or not tasks:
        wrong.append("tasks is not an object with at least one task")
    read = {name: _task(name, task, wrong) for name, task in tasks.items()} if isinstance(tasks, dict) else {}
    problems += shortened([RecipeError(f"{file}: {one}") for one in wrong], file)
    if wrong or not isinstance(model, dict):
        return None
    settings = value.get("settings")
    return Results(str(value.get("tool", "polymerge")), model, read, settings if isinstance(settings, dict) else {})


def _task(name: str, value: Any, wrong: list[str]) -> TaskResult:
    if not isinstance(value, dict):
        wrong.append(f"{name}: is {kind_of(value)}, not an object")
        return TaskResult(None)

    def number(key: str) -> float | None:
        found = value.get(key)
        if found is None or _finite(found):
            return found
        wrong.append(f"{name}: {key} is {found!r:.60}, not a number")
        return None

    def count(key: str) -> int:
        found = value.get(key, 0)
        if isinstance(found, int) and not isinstance(found, bool) and found >= 0:
            return found
        wrong.append(f"{name}: {key} is {found!r:.60}, not a whole number of at least 0")
        return 0

    def numbers(key: str, empty: bool) -> dict[str, Any]:
        found = value.get(key) or {}
        if isinstance(found, dict) and all(_finite(one) or (one is None and empty) for one in found.values()):
            return found
        wrong.append(f"{name}: {key} is not an object of numbers")
        return {}

    if value.get("group") not in ("seen", "unseen", None):
        wrong.append(f"{name}: group is {value.get('group')!r:.60}, not seen, unseen or null")
    if value.get("unit", "%") not in ("%", "points"):
        wrong.append(f"{name}: unit is {value.get('unit')!r:.60}, not % or points")
    return TaskResult(
        number("score"),
        unit=str(value.get("unit", "%")),
        group=value.get("group"),
        as_published=number("as_published"),
        right=number("right"),
        total=count("total"),
        failed=count("failed"),
        reason=value.get("reason"),
        samples=numbers("samples", empty=False) or None,
        metrics=numbers("metrics", empty=True),
        published_metrics=numbers("published_metrics", empty=True),
        notes=tuple(map(str, value.get("notes") or ())),
        settings=value.get("settings") or {},
    )


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
