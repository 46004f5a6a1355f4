"""Resolve the tasks that the user names, and ask their questions; free workers take the next batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from polymerge.errors import RecipeError, collecting, refuse
from polymerge.evaluation.mm_mergebench.annotations import answers_in, question_items, read_truth
from polymerge.evaluation.mm_mergebench.questions import Question, image_root, questions_of, task_folder
from polymerge.evaluation.mm_mergebench.tasks import BENCHMARK, Task, task_named
from polymerge.evaluation.predictions import at_most_shown
from polymerge.evaluation.scorers import scorer_named
from polymerge.evaluation.scorers.caption_metrics import NEEDS_JAVA, captions_module, has_java
from polymerge.evaluation.scoring import TaskScore, score_predictions, score_questions
from polymerge.inference.answering import Attempt, batches
from polymerge.inference.generation import WEIGHTS, Generation
from polymerge.inference.job import AnswerSettings
from polymerge.inference.prompts import Prompt
from polymerge.inference.run_folder import Run
from polymerge.inference.worker import Worker
from polymerge.inference.worker_pool import Call, WorkerPool
from polymerge.paths import given_path
from polymerge.planning import Plan

__all__ = ["AskedTask", "Failures", "QuestionFile", "ask", "read_tasks"]

_OF_A_FILE = 128
"""max_new_tokens for a question file: the benchmark's value for short answers and captions."""

_NEED_CAPTIONS = ("captions", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider")


@dataclass(frozen=True)
class QuestionFile:
    """A question file of the user's, in LLaVA's format with answers, as a task.

    scorer  a row of the table of scorers
    name    of the task; by default those of file and scorer, `digits-exact`
    """

    file: Path
    scorer: str
    name: str = ""


@dataclass(frozen=True)
class AskedTask:
    """A task with its questions and prompt format.

    row        a row of the benchmark's table; None for the user's own question file
    scorer     a row of the scorers' table
    truth      the task's annotation folder, or the question file
    questions  in the file's order
    """

    name: str
    row: Task | None
    scorer: str
    truth: Path
    questions: tuple[Question, ...]
    how: AnswerSettings

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts of the valid questions."""
        return [question.prompt for question in self.questions if question.prompt is not None]

    @property
    def group(self) -> Literal["seen", "unseen"] | None:
        """The benchmark average that it belongs to."""
        return self.row.group if self.row else None

    def settings(self) -> dict[str, Any]:
        """How it is asked and scored."""
        return {
            "scorer": self.scorer,
            "max_new_tokens": self.how.max_new_tokens,
            "image": "pad" if self.how.square else "raw",
            "form": self.row.form if self.row else "text",
        }

    def score(self, predictions: Path) -> TaskScore:
        """Score a file of predictions."""
        if self.row is not None:
            return score_predictions(self.row.name, predictions, self.truth)
        return score_questions(self.scorer, predictions, self.truth)


def read_tasks(
    tasks: Sequence[str | QuestionFile], data: Path | None, images: Path | None, max_new_tokens: int | None
) -> list[AskedTask]:
    """Resolve task names.

    tasks           tasks of the benchmark, a name for several of them (`mm-mergebench`), FILE:SCORER, or question files
    data            the folder of the benchmark's files
    images          base of relative image paths; by default found by looking for the images
    max_new_tokens  of all tasks; None for each task's own

    raises Refused with every problem of names and files, MissingExtraError if a scorer's package is missing.
    """
    found: dict[str, AskedTask] = {}
    with collecting() as wrong:
        if images is not None and not images.is_dir():
            refuse(RecipeError(f"image_folder: there is no folder '{images}'"))
        if data is not None and not data.is_dir():
            refuse(RecipeError(f"data: there is no folder '{data}'"))
        if max_new_tokens is not None:
            refuse(*Generation(max_new_tokens=max_new_tokens).problems())
    if wrong:
        return []
    with collecting() as wrong:
        words: list[str | QuestionFile] = []
        for said in tasks:
            words += BENCHMARK.get(said.lower(), (said,)) if isinstance(said, str) else (said,)
        if not words:
            refuse(RecipeError("tasks: names none"))
        for word in dict.fromkeys(words):
            with collecting():
                task = _asked(word, data, images, max_new_tokens)
                if task.name in found:
                    raise RecipeError(f"tasks: two of them are called '{task.name}'. Rename one of the files")
                found[task.name] = task
    if any(task.scorer in _NEED_CAPTIONS for task in found.values()) and not wrong:
        captions_module("bleu.bleu")  # says now, and not after the last answer, what is not installed
    return list(found.values())


def _asked(word: str | QuestionFile, data: Path | None, images: Path | None, max_new_tokens: int | None) -> AskedTask:
    if isinstance(word, QuestionFile):
        return _of_file(word, images, max_new_tokens)
    file, colon, scorer = word.rpartition(":")
    if colon:
        return _of_file(QuestionFile(Path(file), scorer), images, max_new_tokens)
    if word.endswith((".json", ".jsonl")):
        raise RecipeError(f"tasks: {word} needs a scorer's name behind it, such as {word}:exact")
    task = task_named(word)
    if data is None:
        raise RecipeError(f"tasks {task.name}: say where its files are with `data`")
    folder = task_folder(task, data)
    path = folder / task.questions
    items = question_items(path)
    read_truth(task, folder)  # all that is wrong with the annotations is said before anything is asked
    questions = _can_be_asked(path, questions_of(items, image_root(items, data, folder, images, task.name), task))
    how = AnswerSettings(max_new_tokens or task.max_new_tokens, task.image == "pad")
    return AskedTask(task.name, task, task.scorer, folder, questions, how)


def _of_file(asked: QuestionFile, images: Path | None, max_new_tokens: int | None) -> AskedTask:
    file, row = given_path(asked.file), scorer_named(asked.scorer)
    if row.name in ("captions", "meteor") and not has_java():
        refuse(RecipeError(f"tasks {file}:{row.name}: {NEEDS_JAVA}; score by cider, rouge_l or bleu_4"))
    items = question_items(file)
    with at_most_shown(file):
        for item in items:
            answers_in(item)
    root = image_root(items, file.parent, file.parent, images, file.name)
    questions = _can_be_asked(file, questions_of(items, root))
    how = AnswerSettings(max_new_tokens or _OF_A_FILE)
    return AskedTask(asked.name or f"{file.stem}-{row.name}", None, row.name, file.resolve(), questions, how)


def _can_be_asked(file: Path, questions: Sequence[Question]) -> tuple[Question, ...]:
    if questions and not any(question.prompt for question in questions):
        reason = questions[0].reason
        raise RecipeError(f"{file}: not one of {len(questions)} questions can be asked; the first {reason}")
    return tuple(questions)


Failures = dict[str, dict[int | str, str]]
"""For each task, the questions without an answer and the reasons."""

_Batch = tuple[AskedTask, tuple[Prompt, ...]]


def ask(
    run: Run,
    tasks: Sequence[AskedTask],
    size: int,
    plan: Plan | None,
    pool: WorkerPool,
    progress: Callable[[int, int], None] | None = None,
) -> Failures:
    """Generate answers to all questions that lack one in the run; returns the reasons for missing ones.

    An incomplete batch is run again in full, since the last bits of a model's numbers depend on
    the rest of the batch; failed questions are thereby retried whenever the run is resumed.

    size      of a batch
    plan      applied by workers before the first batch; None to use the checkpoint as it is
    progress  called with the number of questions done, and the total
    """
    failures: Failures = {task.name: {} for task in tasks}
    had = {task.name: set(run.log(task.name).read()) for task in tasks}
    every = [(task, batch) for task in tasks for batch in batches(task.prompts, size)]
    waiting = deque(one for one in every if any(prompt.id not in had[one[0].name] for prompt in one[1]))
    total = sum(len(task.prompts) for task in tasks)
    done = total - sum(len(batch) for _, batch in waiting)

    def write(task: AskedTask, batch: Sequence[Prompt], attempts: Sequence[Attempt]) -> None:
        nonlocal done
        given = [(prompt.id, answer, why) for prompt, (answer, why) in zip(batch, attempts, strict=True)]
        run.log(task.name).append(
            [(name, answer) for name, answer, _ in given if answer is not None and name not in had[task.name]]
        )
        failures[task.name] |= {
            name: why for name, answer, why in given if answer is None and name not in had[task.name]
        }
        done += len(batch)
        if progress is not None:
            progress(done, total)

    if waiting:
        streams = (_calls(waiting, plan) for _ in range(min(pool.count, len(waiting))))
        for asked, attempts in pool.run(streams):
            if asked is not None:
                write(*asked, attempts)
            elif attempts is not None:
                run.write_json(WEIGHTS, attempts)
    return failures


def _calls(waiting: deque[_Batch], plan: Plan | None) -> Iterator[tuple[_Batch | None, Call]]:
    """The calls of one worker: load the model, then answer batches until none is left."""
    yield None, partial(Worker.take, plan=plan)
    while waiting:
        task, batch = waiting.popleft()
        yield (task, batch), partial(Worker.attempt, batch=batch, settings=task.how)
