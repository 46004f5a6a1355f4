"""The single format of results, whatever the evaluation tool: `results.json`.

    {"format": "polymerge results", "version": 1, "tool": "polymerge", "model": {"name": ..., ...}, "settings": {...},
     "tasks": {"ScienceQA": {"group": "seen", "unit": "%", "score": 71.2, "as_published": 71.0, "right": 712,
                             "total": 1000, "failed": 0, "metrics": {...}, "settings": {...}, "notes": [...],
                             "samples": {"17": 1.0, "18": 0.0, ...}}}}

It does not depend on time, machine or number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from polymerge.checkpoints.json_objects import checked, read_json
from polymerge.errors import PolymergeError, RecipeError, refuse
from polymerge.evaluation.predictions import at_most_shown
from polymerge.evaluation.scoring import TaskScore
from polymerge.tables import Table

__all__ = ["FILE", "FORMAT", "VERSION", "Results", "TaskResult", "read_results", "results_beside", "task_result"]

FORMAT, VERSION = "polymerge results", 1
FILE = "results.json"

Number = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]  # neither NaN nor infinite, nor is a sum of them
Group = Literal["seen", "unseen"]
Count = Annotated[int, msgspec.Meta(ge=0)]


class TaskResult(msgspec.Struct, frozen=True):
    """A model's result on a task.

    score         in `unit`; None if unavailable, for the reason in `reason`
    unit          % for a share in percent, else points: the tool's own number, not to be averaged with others
    group         seen, unseen, or None for a task of no benchmark with such groups
    as_published  the published script's output
    right, total  number of right answers, of which the score is the share if there are samples; number of questions
    failed        number of questions that could not be asked or answered; they count as wrong
    samples       each question's score in [0, 1] by its id; None if there are none
    metrics       additional numbers
    settings      how it was evaluated
    """

    score: Number | None = None
    unit: Literal["%", "points"] = "%"
    group: Group | None = None
    as_published: Number | None = None
    right: Number | None = None
    total: Count = 0
    failed: Count = 0
    reason: str | None = None
    samples: Mapping[str, Number] | None = None
    metrics: Mapping[str, Number | None] = {}
    published_metrics: Mapping[str, Number | None] = {}
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = {}


class Results(msgspec.Struct, Table, frozen=True):
    """A model's results.

    tool      polymerge, lmms-eval or vlmevalkit
    model     its name, and what identifies it
    settings  of the entire run
    folder    of the run, if it is the result of `evaluate`
    """

    tool: str
    model: dict[str, Any]
    tasks: dict[str, TaskResult]
    settings: dict[str, Any] = {}
    folder: Path | None = None

    def rows(self) -> list[dict[str, Any]]:
        """A row for each task: its score in `unit`, how many questions it has, and how many have no answer."""
        return [
            {"model": self.name, "task": name, "score": task.score, "unit": task.unit, "questions": task.total,
             "failed": task.failed}
            for name, task in self.tasks.items()
        ]  # fmt: skip

    @property
    def name(self) -> str:
        """The model's name in tables."""
        return str(self.model["name"])

    def to_json(self) -> dict[str, Any]:
        """The content of results.json."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "tool": self.tool,
            "model": dict(self.model),
            "settings": dict(self.settings),
            "tasks": msgspec.to_builtins(self.tasks),
        }


def task_result(
    scored: TaskScore, group: Group | None, failed: int, settings: Mapping[str, Any], folder: Path
) -> TaskResult:
    """Turn a score into a result.

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


_AGAIN = "Evaluate again."


class _Named(msgspec.Struct):
    """The member that every model needs."""

    name: Annotated[str, msgspec.Meta(min_length=1)]


def read_results(path: Path) -> Results | None:
    """Read a results file, or the one in a run's folder; returns None after refusing it."""
    file = path / FILE if path.is_dir() else path
    with at_most_shown(file) as wrong:
        if path.is_dir() and not file.is_file():
            raise RecipeError(f"{path}: has no {FILE}. Is it the folder of a finished `polymerge evaluate`?")
        value = read_json(file, dict[str, Any], encoding="utf-8-sig", error=RecipeError, then=_AGAIN)
        if value.get("format") != FORMAT:
            raise RecipeError(f"{file}: is no results file of `polymerge evaluate`. Give its {FILE}")
        if value.get("version") != VERSION:
            version = value.get("version")
            raise RecipeError(f"{file}: is of version {version!r} of the format, this polymerge reads {VERSION}")
        try:
            checked(value.get("model"), _Named, f"{file}: model", error=RecipeError, then=_AGAIN)
        except PolymergeError as error:
            refuse(error)
        if value.get("tasks") == {}:
            refuse(RecipeError(f"{file}: tasks is empty. {_AGAIN}"))
        found = checked({"tool": "polymerge", **value}, Results, str(file), error=RecipeError, then=_AGAIN)
    return None if wrong else found


def results_beside(folder: Path) -> list[Results]:
    """The results of a model that lie in its folder, or in that of a run beside it."""
    if not folder.is_dir():
        return []
    places = [folder, *sorted(path for path in folder.resolve().parent.iterdir() if path.is_dir())]
    found = []
    for place in (one for one in places if (one / FILE).is_file()):
        try:
            read = read_results(place)
        except PolymergeError:
            continue  # no results of ours
        if read is not None and Path(str(read.model.get("source", ""))).resolve() == folder.resolve():
            found.append(read)
    return found
