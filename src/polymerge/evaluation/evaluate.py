"""Evaluate a model: read the tasks, ask, score, and write results.json."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from polymerge.checkpoints.hub import one_commit
from polymerge.errors import PolymergeError, RecipeError, Refused, refuse_if_any
from polymerge.evaluation.ask_tasks import Failures, ask
from polymerge.evaluation.evaluated_model import Subject, subject
from polymerge.evaluation.prompted_tasks import Exam, read_exams
from polymerge.evaluation.results import FILE, Results, TaskResult, task_result
from polymerge.inference.generation import Generation
from polymerge.inference.run_folder import Run, alone_in, open_run

__all__ = ["ERRORS", "evaluate"]

ERRORS = "errors.jsonl"

T = TypeVar("T")


@one_commit()
def evaluate(
    model: str,
    tasks: Sequence[str],
    out: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    image_folder: str | os.PathLike[str] | None = None,
    name: str | None = None,
    max_new_tokens: int | None = None,
    generation: Generation | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Results:
    """Ask a model the questions of some tasks, score its answers and write RUN/results.json.

    The run's folder keeps every answer as it is given, so a run that was stopped goes on; a question that cannot be
    asked or answered stands in errors.jsonl, is counted and is wrong.

    model           a checkpoint, a hub id, BASE+ADAPTER or an adapter; an adapter is folded in in memory
    tasks           of MM-MergeBench (`mm-mergebench` for all), or FILE:SCORER
    out             the folder of the run
    data            the benchmark's files, in either published layout
    image_folder    what image paths are relative to; else guessed
    name            of the model in tables
    max_new_tokens  of all tasks; None for each one's own
    generation      batch size, device, workers and so on; its max_new_tokens does not count
    force           drop what a run with other settings left in `out`

    raises Refused with everything that is wrong with model, tasks and files before anything is asked; CheckpointError
    where the model does not load.
    """
    generation = generation or Generation()
    problems = generation.problems()
    asked = _gathered(lambda: subject(model, name), problems)
    exams = _gathered(lambda: read_exams(tasks, _path(data), _path(image_folder), max_new_tokens), problems)
    refuse_if_any(problems)
    assert asked is not None
    assert exams is not None
    run = open_run(Path(out), _settings(asked, exams, generation), force=force, what="an evaluation", parts="tasks")
    asked.fetch()
    with alone_in(run), generation.worker_pool(asked.plan, str(asked.folder)) as pool:
        failures = ask(run, exams, generation.batch_size, asked.plan, pool, progress)
        _unasked(exams, failures)
        _write_errors(run, exams, failures)
        results = Results(
            "polymerge",
            asked.described(),
            {exam.name: _result(run, exam, asked.name, failures[exam.name]) for exam in exams},
            {
                "polymerge": importlib.metadata.version("polymerge"),
                "batch_size": generation.batch_size,
                "device": generation.device.partition(":")[0],
                "dtype": generation.dtype,
            },
        )
        run.write_json(FILE, results.to_json())
    return results


def _gathered(read: Callable[[], T], problems: list[PolymergeError]) -> T | None:
    """What is read, or None and what is wrong with it."""
    try:
        return read()
    except (Refused, RecipeError) as error:
        problems += error.problems
    return None


def _path(path: str | os.PathLike[str] | None) -> Path | None:
    return None if path is None else Path(path).expanduser()


def _settings(asked: Subject, exams: Sequence[Exam], generation: Generation) -> dict[str, Any]:
    """What the answers depend on."""
    return {
        "kind": "evaluation",
        "model": asked.identity(),
        "tasks": {exam.name: {**exam.settings(), "prompts": _digest(exam)} for exam in exams},
        "batch_size": generation.batch_size,
        "device": generation.device.partition(":")[0],
        "dtype": generation.dtype,
    }


def _digest(exam: Exam) -> str:
    """sha256 of what is asked; images are told apart by their paths, for there may be very many."""
    text = json.dumps([[one.id, one.text, one.images] for one in exam.prompts])
    return hashlib.sha256(text.encode()).hexdigest()


def _unasked(exams: Sequence[Exam], failures: Failures) -> None:
    """Add the questions that could not even be asked."""
    for exam in exams:
        failures[exam.name] |= {one.id: one.reason for one in exam.questions if one.prompt is None}


def _write_errors(run: Run, exams: Sequence[Exam], failures: Failures) -> None:
    """A line for every question without an answer, in the order of the files."""
    lines = [
        {"task": exam.name, "id": one.id, "reason": failures[exam.name][one.id]}
        for exam in exams
        for one in exam.questions
        if one.id in failures[exam.name]
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (run.folder / ERRORS).write_text(text, encoding="utf-8")


def _result(run: Run, exam: Exam, model: str, failed: Mapping[int | str, str]) -> TaskResult:
    """Write the exam's answers as the scripts of LLaVA do, and score that file."""
    answers = run.log(exam.name).read()
    lines: list[dict[str, Any]] = [
        {
            "question_id": one.id,
            "prompt": one.written,
            "text": answers.get(one.id) if one.id not in failed else None,
            "model_id": model,
            "metadata": {},
        }
        for one in exam.questions
    ]
    file = run.part(exam.name) / "predictions.jsonl"
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return task_result(exam.score(file), exam.group, len(failed), exam.settings(), run.folder)
