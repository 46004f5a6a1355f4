"""What is asked: the tasks that the user names, found in the data, as questions and with how they are asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymerge.errors import PolymergeError, RecipeError, Refused
from polymerge.evaluation.mm_mergebench.annotations import Item, answers_in, question_items, read_truth
from polymerge.evaluation.mm_mergebench.layouts import image_root, task_folder
from polymerge.evaluation.mm_mergebench.questions import Question, images_of, questions_of
from polymerge.evaluation.mm_mergebench.tasks import BENCHMARK, Task, task_named
from polymerge.evaluation.scorers import scorer_named
from polymerge.evaluation.scorers.java import NEEDS_JAVA, captions_module, has_java
from polymerge.evaluation.scoring import TaskScore, score_predictions, score_questions
from polymerge.inference.prompts import Prompt
from polymerge.inference.worker import AnswerSettings

__all__ = ["Exam", "read_exams"]

_OF_A_FILE = 128
"""max_new_tokens for a question file, as the benchmark has it for short answers and captions."""

_NEED_CAPTIONS = ("captions", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider")


@dataclass(frozen=True)
class Exam:
    """A task, ready to be asked.

    task       a row of the benchmark's table; None for a question file of the user's
    scorer     a row of the scorers' table
    truth      the task's annotation folder, or the question file
    questions  in the file's order
    """

    name: str
    task: Task | None
    scorer: str
    truth: Path
    questions: tuple[Question, ...]
    how: AnswerSettings

    @property
    def prompts(self) -> list[Prompt]:
        """What can be asked."""
        return [question.prompt for question in self.questions if question.prompt is not None]

    @property
    def group(self) -> str | None:
        """Of the benchmark."""
        return self.task.group if self.task else None

    def settings(self) -> dict[str, Any]:
        """AnswerSettings it is asked."""
        return {
            "scorer": self.scorer,
            "max_new_tokens": self.how.max_new_tokens,
            "image": "pad" if self.how.square else "raw",
            "form": self.task.form if self.task else "text",
        }

    def score(self, predictions: Path) -> TaskScore:
        """What a file of predictions is worth."""
        if self.task is not None:
            return score_predictions(self.task.name, predictions, self.truth)
        return score_questions(self.scorer, predictions, self.truth)


def read_exams(tasks: Sequence[str], data: Path | None, images: Path | None, max_new_tokens: int | None) -> list[Exam]:
    """The exams that the words after --tasks mean.

    tasks           of the benchmark, a name for several of them (`mm-mergebench`), or FILE:SCORER
    data            holds the benchmark's files
    images          what image paths are relative to; else it is guessed from where images are
    max_new_tokens  of all; None for that of each task

    raises Refused with everything that is wrong with names and files, MissingExtraError where a scorer lacks a package.
    """
    problems: list[PolymergeError] = []
    if images is not None and not images.is_dir():
        problems.append(RecipeError(f"--image-folder: there is no folder '{images}'"))
    if data is not None and not data.is_dir():
        problems.append(RecipeError(f"--data: there is no folder '{data}'"))
    if max_new_tokens is not None and max_new_tokens < 1:
        problems.append(RecipeError(f"--max-new-tokens: {max_new_tokens} is too few"))
    if problems:
        raise Refused(problems)
    exams: dict[str, Exam] = {}
    words = [one for word in tasks for one in BENCHMARK.get(word.lower(), (word,))]
    if not words:
        problems.append(RecipeError("--tasks: names none"))
    for word in dict.fromkeys(words):
        try:
            exam = _exam(word, data, images, max_new_tokens, problems)
        except PolymergeError as error:
            problems.append(error)
            continue
        if exam is not None and exam.name in exams:
            problems.append(RecipeError(f"--tasks: two of them are called '{exam.name}'. Rename one of the files"))
        elif exam is not None:
            exams[exam.name] = exam
    if problems:
        raise Refused(problems)
    if any(exam.scorer in _NEED_CAPTIONS for exam in exams.values()):
        captions_module("bleu.bleu")  # says now, and not after the last answer, what is not installed
    return list(exams.values())


def _exam(
    word: str, data: Path | None, images: Path | None, max_new_tokens: int | None, problems: list[PolymergeError]
) -> Exam | None:
    file, colon, scorer = word.rpartition(":")
    if colon:
        return _of_file(Path(file).expanduser(), scorer, images, max_new_tokens, problems)
    if word.endswith((".json", ".jsonl")):
        raise RecipeError(f"--tasks: {word} needs a scorer's name behind it, such as {word}:exact")
    task = task_named(word)
    if data is None:
        raise RecipeError(f"--tasks {task.name}: say where its files are with --data DIR")
    before = len(problems)
    folder = task_folder(task, data, problems)
    if folder is None:
        return None
    items = question_items(folder / task.questions, problems)
    read_truth(task, folder, problems)  # all that is wrong with the annotations is said before anything is asked
    root = _root(items, data, folder, images, task.name, problems) if len(problems) == before else folder
    questions = tuple(questions_of(items, root, task))
    if len(problems) == before and not any(question.prompt for question in questions):
        problems.append(_nothing(folder / task.questions, questions))
    how = AnswerSettings(max_new_tokens or task.max_new_tokens, task.image == "pad")
    return Exam(task.name, task, task.scorer, folder, questions, how) if len(problems) == before else None


def _of_file(
    file: Path, scorer: str, images: Path | None, max_new_tokens: int | None, problems: list[PolymergeError]
) -> Exam | None:
    before = len(problems)
    row = scorer_named(scorer)
    if row.name in ("captions", "meteor") and not has_java():
        problems.append(RecipeError(f"--tasks {file}:{scorer}: {NEEDS_JAVA}; score by cider, rouge_l or bleu_4"))
    items = question_items(file, problems)
    for item in items:
        answers_in(item, problems)
    folder = file.parent
    root = _root(items, folder, folder, images, file.name, problems) if len(problems) == before else folder
    questions = tuple(questions_of(items, root))
    if len(problems) == before and not any(question.prompt for question in questions):
        problems.append(_nothing(file, questions))
    name = f"{file.stem}-{row.name}"
    how = AnswerSettings(max_new_tokens or _OF_A_FILE)
    return Exam(name, None, row.name, file.resolve(), questions, how) if len(problems) == before else None


def _root(
    items: Sequence[Item], data: Path, folder: Path, told: Path | None, name: str, problems: list[PolymergeError]
) -> Path:
    return image_root([one for item in items for one in images_of(item) or ()], data, folder, told, name, problems)


def _nothing(file: Path, questions: Sequence[Question]) -> RecipeError:
    return RecipeError(f"{file}: not one of {len(questions)} questions can be asked; the first {questions[0].reason}")
