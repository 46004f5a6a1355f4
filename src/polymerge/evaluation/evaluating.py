"""Evaluate a model: read the tasks, ask, score, and write results.json."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from polymerge.checkpoints.hub import one_commit
from polymerge.durable import write_file
from polymerge.errors import PolymergeError, RecipeError, collecting, refuse
from polymerge.evaluation.asking import AskedTask, Failures, QuestionFile, ask, read_tasks
from polymerge.evaluation.evaluated_model import EvaluatedModel, evaluated_model
from polymerge.evaluation.results import FILE, Results, TaskResult, task_result
from polymerge.inference.generation import Generation
from polymerge.inference.run_folder import Run, alone_in, open_run
from polymerge.paths import given_path

__all__ = ["ERRORS", "evaluate"]

ERRORS = "errors.jsonl"


@one_commit()
def evaluate(
    model: str | os.PathLike[str],
    tasks: Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    scorer: str | None = None,
    data: str | os.PathLike[str] | None = None,
    image_folder: str | os.PathLike[str] | None = None,
    name: str | None = None,
    max_new_tokens: int | None = None,
    generation: Generation | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Results:
    """Ask a model the questions of tasks, score its answers and write RUN/results.json.

    Answers are saved as they are generated, so that an interrupted run can be resumed; a question that cannot be
    asked or answered is listed in errors.jsonl and counted as wrong.

    model           a checkpoint, a hub id, BASE+ADAPTER or an adapter; adapters are folded in memory
    tasks           of MM-MergeBench (`mm-mergebench` for all); or, with a scorer, a question file, several, or one by
                    the name of each task. FILE:SCORER is a file with a scorer of its own
    out             the folder of the run
    scorer          a row of the table of scorers, for question files
    data            the benchmark's files, in either published layout
    image_folder    base of relative image paths; by default found by looking for the images
    name            the model's name in tables
    max_new_tokens  of all tasks; None for each one's own
    generation      batch size, device, workers and so on; its max_new_tokens is ignored
    force           discard an earlier run with other settings in `out`

    raises Refused with every problem of model, tasks and files before anything is generated; CheckpointError
    if the model does not load.
    """
    generation = generation or Generation()
    wrong = generation.problems()
    asked, found = None, list[AskedTask]()
    try:
        asked = evaluated_model(os.fspath(model), name)
    except PolymergeError as error:
        wrong += error.problems
    with collecting():
        refuse(*wrong)
        found = read_tasks(_tasks(tasks, scorer), _path(data), _path(image_folder), max_new_tokens)
    assert asked is not None
    run = open_run(
        given_path(out), _settings(asked, found, generation), force=force, what="an evaluation", parts="tasks"
    )
    asked.fetch()
    with alone_in(run), generation.worker_pool(asked.plan, str(asked.folder)) as pool:
        failures = ask(run, found, generation.batch_size, asked.plan, pool, progress)
        _unasked(found, failures)
        _write_errors(run, found, failures)
        results = Results(
            "polymerge",
            asked.described(),
            {task.name: _result(run, task, asked.name, failures[task.name]) for task in found},
            {"polymerge": importlib.metadata.version("polymerge"), **_how(generation)},
        )
        run.write_json(FILE, results.to_json())
    return msgspec.structs.replace(results, folder=run.folder)


def _tasks(
    tasks: Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]] | str | os.PathLike[str],
    scorer: str | None,
) -> list[str | QuestionFile]:
    """Tasks as `evaluate` takes them, one by one."""
    several = [tasks] if isinstance(tasks, str | os.PathLike) else list(tasks)
    files = [str(task) for task in several if isinstance(tasks, Mapping) or isinstance(task, os.PathLike)]
    if files and scorer is None:
        raise RecipeError(f"scorer: say how the questions of {', '.join(files)} are scored, such as exact")
    if isinstance(tasks, Mapping) and scorer is not None:
        return [QuestionFile(Path(file), scorer, name) for name, file in tasks.items()]
    if scorer is None:
        return [os.fspath(task) for task in several]
    return [QuestionFile(Path(file), scorer) for file in several]


def _path(path: str | os.PathLike[str] | None) -> Path | None:
    return None if path is None else given_path(path)


def _settings(asked: EvaluatedModel, tasks: Sequence[AskedTask], generation: Generation) -> dict[str, Any]:
    """Everything that the answers depend on."""
    return {
        "kind": "evaluation",
        "model": asked.identity(),
        "tasks": {task.name: {**task.settings(), "prompts": _digest(task)} for task in tasks},
        **_how(generation),
    }


def _how(generation: Generation) -> dict[str, Any]:
    """The settings of all tasks; each has its own `max_new_tokens`."""
    return {name: value for name, value in generation.settings.items() if name != "max_new_tokens"}


def _digest(task: AskedTask) -> str:
    """sha256 of the prompts, with images by path only, since there may be many."""
    text = json.dumps([[one.id, one.text, one.images] for one in task.prompts])
    return hashlib.sha256(text.encode()).hexdigest()


def _unasked(tasks: Sequence[AskedTask], failures: Failures) -> None:
    """Add the questions that could not be asked."""
    for task in tasks:
        failures[task.name] |= {one.id: one.reason for one in task.questions if one.prompt is None}


def _write_errors(run: Run, tasks: Sequence[AskedTask], failures: Failures) -> None:
    """Write one line per question without an answer, in the order of the question files."""
    lines = [
        {"task": task.name, "id": one.id, "reason": failures[task.name][one.id]}
        for task in tasks
        for one in task.questions
        if one.id in failures[task.name]
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_file(run.folder / ERRORS, text)


def _result(run: Run, task: AskedTask, model: str, failed: Mapping[int | str, str]) -> TaskResult:
    """Write the task's answers in the format of LLaVA's scripts, and score that file."""
    answers = run.log(task.name).read()
    lines: list[dict[str, Any]] = [
        {
            "question_id": one.id,
            "prompt": one.written,
            "text": answers.get(one.id) if one.id not in failed else None,
            "model_id": model,
            "metadata": {},
        }
        for one in task.questions
    ]
    file = run.part(task.name) / "predictions.jsonl"
    write_file(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return task_result(task.score(file), task.group, len(failed), task.settings(), run.folder)
