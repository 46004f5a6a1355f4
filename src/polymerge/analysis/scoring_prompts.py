"""Ask changed models the prompts of several tasks, and score what they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from re import fullmatch
from typing import Any

from polymerge.errors import PolymergeError, RecipeError
from polymerge.evaluation.scorers import SCORERS, scorer_named
from polymerge.inference.fingerprints import of_prompts
from polymerge.inference.generation import Batches, Generation, generate
from polymerge.inference.prompts import Prompt, PromptSource, draw_prompts
from polymerge.inference.run_folder import Run, alone_in, open_run
from polymerge.planning import Plan

__all__ = ["Marks", "Task", "ask", "begin", "read_tasks"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Task:
    """A task of a run and its prompts."""

    name: str
    asked: Batches


@dataclass(frozen=True)
class Marks:
    """What a model's answers to a task are worth.

    score    in percent
    samples  each prompt's share of right, in the order of the prompts; None where the score is no mean of such
    """

    score: float
    samples: tuple[float, ...] | None


def read_tasks(
    said: Sequence[str], scorer: str, samples: int, seed: int, generation: Generation, problems: list[PolymergeError]
) -> dict[str, list[Prompt]]:
    """Read the prompts of each task, `FILE` or `NAME=FILE`; what is wrong with any of it goes to `problems`.

    samples  of each task; 0 for all
    """
    problems += generation.problems()
    try:
        scorer_named(scorer)
    except RecipeError as error:
        problems.append(RecipeError(f"--scorer: {error}"))
    if not said:
        problems.append(RecipeError("--prompts: say where prompts are"))
    tasks: dict[str, list[Prompt]] = {}
    for text in said:
        name, file = _named(text)
        if not fullmatch(r"[\w.\-]*\w[\w.\-]*", name):
            problems.append(RecipeError(f"--prompts {text}: '{name}' is no name for a task. Say NAME={file}"))
        elif name in tasks:
            problems.append(RecipeError(f"--prompts {text}: there is a task '{name}' already. Say NAME={file}"))
        tasks[name] = []
        try:
            tasks[name] = draw_prompts(PromptSource(file, samples, seed))
        except PolymergeError as error:
            problems += error.problems
        without = [prompt.id for prompt in tasks[name] if prompt.answer is None]
        if without:
            problems.append(
                RecipeError(
                    f"--prompts {text}: {len(without)} of {len(tasks[name])} prompts have no answer, the first of them "
                    f"{without[0]!r}, and nothing can be scored without"
                )
            )
    return tasks


def begin(
    folder: Path, what: str, settings: Mapping[str, Any], drawn: Mapping[str, Sequence[Prompt]], size: int, force: bool
) -> tuple[Run, list[Task]]:
    """Begin a run, or go on with one of the same settings.

    what      is run, as messages say it
    settings  what the answers depend on besides the prompts
    drawn     each task's prompts
    size      of a batch
    """
    digests = {name: of_prompts(prompts) for name, prompts in drawn.items()}
    run = open_run(folder, {**settings, "prompts": digests}, force=force, what=what)
    tasks = []
    for name, prompts in drawn.items():
        own = Run(folder / "tasks" / name)
        own.folder.mkdir(parents=True, exist_ok=True)
        tasks.append(Task(name, Batches(own.keep_prompts(prompts), size)))
    return run, tasks


def ask(
    run: Run,
    tasks: Sequence[Task],
    plans: Mapping[str, Plan],
    generation: Generation,
    scorer: str,
    progress: Progress | None = None,
    kept_as: str = "",
) -> dict[str, dict[str, Marks]]:
    """Have every plan's model answer every task; each task's marks by the plan's name.

    plans    of one template
    kept_as  what stands between the task's name and the plan's where answers are kept: `candidates/TASK,NAME`
    """
    total = len(plans) * sum(len(task.asked.prompts) for task in tasks)
    before = 0
    marks: dict[str, dict[str, Marks]] = {}
    with alone_in(run), generation.worker_pool(next(iter(plans.values()))) as pool:

        def tell(done: int, _: int) -> None:
            if progress is not None:
                progress(before + done, total)

        for task in tasks:
            kept = {f"{task.name},{kept_as}{name}": plan for name, plan in plans.items()}
            answers = generate(run, kept, task.asked, pool, tell)
            before += len(plans) * len(task.asked.prompts)
            marks[task.name] = {name: _marks(scorer, task, answers[f"{task.name},{kept_as}{name}"]) for name in plans}
    return marks


def _marks(scorer: str, task: Task, answers: Mapping[int | str, str]) -> Marks:
    prompts = task.asked.prompts
    scored = SCORERS[scorer].score([answers[one.id] for one in prompts], [one.answer for one in prompts])
    return Marks(float(scored.score), scored.samples)


def _named(text: str) -> tuple[str, str]:
    """The task's name and its file; a path that exists is one, whatever characters it has."""
    name, equals, file = text.partition("=")
    if equals and not Path(text).expanduser().exists():
        return name, file
    return Path(text.partition("@")[0]).stem, text
