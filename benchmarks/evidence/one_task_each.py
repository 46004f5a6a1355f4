"""Merges of models that were taught one task each: adapters, with and without a common start, and full fine-tunes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import adapters as of_adapters
import finetunes as of_finetunes
from cases import Case
from course import Course
from exam import UNTAUGHT, Exam, Kept, Row, contest
from interview import Interview
from models import adapters_of, finetunes_of
from polymerge.demo.world import ARITHMETIC
from sizes import Size

__all__ = ["SPECTRAL", "adapters", "finetunes"]

ALIKE = ("linear", "cat", "ramplus_tl")
"""Merges of adapters that give the bits of another one, or nearly: once is enough."""
OF_STARTS = (
    "task_arithmetic", "ties", "robustmerge", "robustmerge, compose: product", "linear, space: factors",
    "ties, space: core", "tsv", "iso_c",
)  # fmt: skip
"""Merges that are tried with adapters without a common start as well."""


def _spectral() -> dict[str, Case]:
    """Means, what trims, and every method of whole matrices, that scales all that it changes."""
    cases = of_finetunes.CASES
    plain = ("task_arithmetic", "ties", "breadcrumbs", "task_arithmetic, weight: 1, calibrate: svc")
    matrices = [name for name, case in cases.items() if case.row.on == "matrices" and case.row.models is None]
    return {name: cases[name] for name in (*plain, *matrices) if cases[name].row.parameter("scale")}


SPECTRAL = _spectral()


def adapters(course: Course, size: Size, folder: Path, work: Path) -> list[dict[str, Any]]:
    """Every merge of four adapters at its searched scale, with the norm beside it; by how the adapters began."""
    every = {name: case for name, case in of_adapters.CASES.items() if name not in ALIKE}
    some = {name: every[name] for name in OF_STARTS}
    rows = []
    for start, cases in (("common", every), ("own", some)):
        places = adapters_of(folder, start)
        alone = {task: _of_one(adapter, folder, adapter=True) for task, adapter in places.items()}
        rows += _rows({"start": start}, course, size, folder, work / start, ARITHMETIC, alone, cases, None)
    return rows


def finetunes(course: Course, size: Size, folder: Path, work: Path) -> list[dict[str, Any]]:
    """Merges of three full fine-tunes at equal norms, and each at its searched scale."""
    places = finetunes_of(folder)
    alone = {task: _of_one(tuned, folder, adapter=False) for task, tuned in places.items()}
    return _rows({}, course, size, folder, work, of_finetunes.TASKS, alone, SPECTRAL, folder / "vlm")


def _of_one(model: Path, folder: Path, *, adapter: bool) -> dict[str, Any]:
    """The recipe of one of the merged models as it is."""
    listed = [{"model": str(model), "parameters": {"weight": 1.0}}]
    return {"merge_method": "linear", **({} if adapter else {"template": str(folder / "vlm")}), "models": listed}


def _rows(
    about: Mapping[str, str],
    course: Course,
    size: Size,
    folder: Path,
    work: Path,
    tasks: tuple[str, ...],
    alone: Mapping[str, Mapping[str, Any]],
    cases: Mapping[str, Case],
    base: Path | None,
) -> list[dict[str, Any]]:
    """Search the scale of each case, and ask it; before that each model on its own task, and the model of all.

    base  that fine-tunes are merged onto; None for adapters
    """
    work.mkdir(parents=True, exist_ok=True)
    models = [Path(recipe["models"][0]["model"]) for recipe in alone.values()]
    with Interview(course, size, folder, next(iter(alone.values()))) as interview:
        untaught = (*(task for task in ARITHMETIC if task not in tasks), UNTAUGHT, "order")
        each = size.exam[UNTAUGHT] // 2
        exam = Exam(
            tasks,
            {task: interview.questions(task, "exam", each) for task in (*tasks, *untaught)},
            [one for task in tasks for one in interview.questions(task, "dev", max(1, size.dev // len(tasks)))],
            interview.processor,
        )
        first = Row(exam.ask(interview.model))
        norms = {task: interview.merge(recipe) for task, recipe in alone.items()}
        mean = math.sqrt(sum(norm**2 for norm in norms.values()) / len(norms))
        own = {}
        for task, recipe in alone.items():
            interview.merge(recipe)
            own[task] = exam.ask(interview.model)[task]

        def made(case: Case, scale: float | None) -> tuple[Any, float]:
            recipe = case.recipe(models, base, scale)
            norm = interview.merge(recipe if base is None else {**recipe, "template": str(base)})
            return interview.model, norm / mean

        chosen = dict(list(cases.items())[: size.cases])
        searched = contest(chosen, made, exam, Kept(work / "merges.json", f"{size.digest} {course.seed}"))
    rows = [{"merge": "none", "exam": _counted(first)}, {"merge": "each on its own task", "exam": _counted(Row(own))}]
    rows += [
        {"merge": name, "failure": row.failure}
        if row.failure
        else {
            "merge": name, "scale": row.scale, "norm": row.norm, "exam": _counted(row),
            "dev by norm": {norm: (right, len(exam.others)) for norm, right in row.right.items()},
            "as it is": {"norm": row.as_is[0], "dev": (row.as_is[1], len(exam.others))},
        }
        for name, row in searched.items()
    ]  # fmt: skip
    return [{**about, **row} for row in rows]


def _counted(row: Row) -> dict[str, tuple[int, int]]:
    return {task: (sum(marks), len(marks)) for task, marks in row.marks.items()}
