"""Let modified models answer the prompts of several tasks, score the answers, and resample the scores."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from re import fullmatch
from typing import Any

from polymerge.durable import make_folder
from polymerge.errors import RecipeError, collecting, refuse
from polymerge.evaluation.scorers import SCORERS, scorer_named
from polymerge.inference.generation import Batches, Generation, generate
from polymerge.inference.prompts import Prompt, PromptSource, draw_prompts
from polymerge.inference.run_folder import Run, alone_in, identity_of_prompts, open_run
from polymerge.planning import Plan

__all__ = [
    "RESAMPLES",
    "Interval",
    "Score",
    "Task",
    "TaskPrompts",
    "Tasks",
    "ask",
    "begin",
    "draw_tasks",
    "installed_version",
    "interval",
    "resampled",
]

RESAMPLES = 2000
installed_version = partial(version, "polymerge")
Interval = tuple[float, float]
Tasks = Mapping[str, str | os.PathLike[str]] | str | os.PathLike[str]
"""A file of prompts by the name of its task; one file alone is a task that is called as the file is."""

Floats = Any


@dataclass(frozen=True)
class Task:
    """A task of a run and its prompts."""

    name: str
    asked: Batches

    @property
    def prompts(self) -> TaskPrompts:
        """Its prompts, for a report."""
        ids = tuple(prompt.id for prompt in self.asked.prompts)
        return TaskPrompts(len(ids), ids)


@dataclass(frozen=True)
class TaskPrompts:
    """The number of prompts of a task, and their ids in order."""

    prompts: int
    ids: tuple[int | str, ...]


@dataclass(frozen=True)
class Score:
    """A model's score on a task.

    score    in percent
    samples  the score of each answer, in [0, 1], in the order of the prompts; None if the score is not their mean
    """

    score: float
    samples: tuple[float, ...] | None


def draw_tasks(tasks: Tasks, scorer: str, samples: int, seed: int, generation: Generation) -> dict[str, list[Prompt]]:
    """Draw the prompts of each task, refusing problems of tasks, scorer or generation.

    tasks    files of prompts with answers
    scorer   a row of the table of scorers
    samples  number to draw per task; 0 for all
    """
    refuse(*generation.problems())
    with collecting():
        try:
            scorer_named(scorer)
        except RecipeError as error:
            raise RecipeError(f"scorer: {error}") from None
    if not tasks:
        refuse(RecipeError("prompts: say where prompts are"))
    drawn: dict[str, list[Prompt]] = {}
    for name, file in (tasks if isinstance(tasks, Mapping) else {Path(tasks).stem: tasks}).items():
        if not fullmatch(r"[\w.\-]*\w[\w.\-]*", name):
            refuse(RecipeError(f"prompts: '{name}' is no name for a task, which has letters, digits, `.`, `-` and `_`"))
        drawn[name] = []
        with collecting():
            drawn[name] = draw_prompts(PromptSource(file, samples, seed))
        without = [prompt.id for prompt in drawn[name] if prompt.answer is None]
        if without:
            refuse(
                RecipeError(
                    f"prompts {file}: {len(without)} of {len(drawn[name])} prompts have no answer, the first of them "
                    f"{without[0]!r}, and nothing can be scored without"
                )
            )
    return drawn


def begin(
    folder: Path, what: str, settings: Mapping[str, Any], drawn: Mapping[str, Sequence[Prompt]], size: int, force: bool
) -> tuple[Run, list[Task]]:
    """Start a run, or resume one with the same settings.

    what      the kind of run, for messages
    settings  the settings that answers depend on besides the prompts
    drawn     the prompts of each task
    size      of a batch
    force     discard a run with other settings
    """
    digests = {name: identity_of_prompts(prompts) for name, prompts in drawn.items()}
    run = open_run(folder, {**settings, "prompts": digests}, force=force, what=what)
    tasks = []
    for name, prompts in drawn.items():
        own = Run(folder / "tasks" / name)
        make_folder(own.folder)
        tasks.append(Task(name, Batches(own.keep_prompts(prompts), size)))
    return run, tasks


def ask(
    run: Run,
    tasks: Sequence[Task],
    plans: Mapping[str, Plan],
    generation: Generation,
    scorer: str,
    progress: Callable[[int, int], None] | None = None,
    prefix: str = "",
) -> dict[str, dict[str, Score]]:
    """Let the model of every plan answer every task; returns the scores by task and plan.

    plans   all with the same template
    prefix  of a plan's name in the path of its answers: `candidates/TASK,PREFIX-NAME`
    """
    total = len(plans) * sum(len(task.asked.prompts) for task in tasks)
    before = 0
    scores: dict[str, dict[str, Score]] = {}
    with alone_in(run), generation.worker_pool(next(iter(plans.values()))) as pool:

        def tell(done: int, _: int) -> None:
            if progress is not None:
                progress(before + done, total)

        for task in tasks:
            names = {name: f"{task.name},{prefix}{name}" for name in plans}
            answers = generate(run, {names[name]: plan for name, plan in plans.items()}, task.asked, pool, tell)
            before += len(plans) * len(task.asked.prompts)
            scores[task.name] = {name: _score(scorer, task, answers[names[name]]) for name in plans}
    return scores


def _score(scorer: str, task: Task, answers: Mapping[int | str, str]) -> Score:
    prompts = task.asked.prompts
    scored = SCORERS[scorer].score([answers[one.id] for one in prompts], [one.answer for one in prompts])
    return Score(float(scored.score), scored.samples)


def resampled(scores: Sequence[Score], task: str, seed: int, count: int = RESAMPLES) -> Floats | None:
    """Scores on prompts drawn with replacement, in percent: float64 [resample, score].

    Each resample draws the same prompts for all of the scores; the draws depend on seed, task and the number of
    prompts. None if a score is not a mean over prompts.
    """
    import numpy as np

    rows = [one.samples for one in scores]
    if any(row is None for row in rows):
        return None
    samples = np.array(rows, np.float64)
    dice = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}\0{task}".encode()).digest()[:8], "little"))
    found = np.empty((count, len(samples)))
    for place in range(count):
        found[place] = samples[:, dice.integers(0, samples.shape[1], samples.shape[1])].mean(axis=1)
    return 100 * found


def interval(values: Floats | None) -> Interval | None:
    """The percentile interval that holds 95 % of resampled values; None if there are none."""
    import numpy as np

    if values is None:
        return None
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)
