"""Ask merged models about scans that nobody was taught, and search the scale of each merge by other questions."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cases import NORMS, Case
from lessons import SEED, VLM
from polymerge.demo import trained_models
from polymerge.demo.digit_questions import Question, Share, draw_questions, in_pictures, score, share
from polymerge.demo.world import ARITHMETIC, PERCEPTION, Pairs, load_handwriting, split_pairs
from polymerge.errors import PolymergeError

__all__ = ["FIRST", "UNTAUGHT", "Exam", "Kept", "Row", "contest", "of_the_demo"]

UNTAUGHT = "perception"
SEARCH_SEED, SEARCH_PICTURES = SEED + 1, 1  # of the questions that a scale is searched with

FIRST = range(2, 7)  # of the norms, that every search tries

Made = Callable[[Case, float | None], tuple[Any, float]]
"""Merges by a case, as it is or at a scale: the model, and the norm of the update over the root mean square of all."""


@dataclass(frozen=True)
class Row:
    """A model's answers: by task, 1 for right and 0 for wrong.

    norm     of what the model's training or merge changes, over the root mean square of the merged models'
    scale    that was searched; None for what is no merge of polymerge's
    right    how many answers to other questions were right, by the norm that a search tried
    as_is    the norm of the merge without a search, and how many answers to those questions were right
    failure  why there are no answers
    """

    marks: Mapping[str, Sequence[int]] = field(default_factory=dict)
    norm: float | None = None
    scale: float | None = None
    right: Mapping[str, int] = field(default_factory=dict)
    as_is: tuple[float, int] = (0.0, 0)
    failure: str = ""


class Exam:
    """The questions: on tasks that the merged models were taught, and on others.

    questions  by task
    others     on the taught tasks, by which a scale is searched
    """

    def __init__(
        self,
        taught: Sequence[str],
        questions: Mapping[str, Sequence[Question]],
        others: Sequence[Question],
        processor: Any,
    ) -> None:
        self.taught = tuple(taught)
        self.untaught = tuple(task for task in questions if task not in taught)
        self.questions, self.others, self.processor = questions, others, processor
        self._asked = {task: list(in_pictures(processor, some)) for task, some in questions.items()}
        self._others = list(in_pictures(processor, others))

    def right_of_others(self, model: Any) -> int:
        """How many answers are right to questions on the taught tasks that are not in the exam."""
        return sum(score(model, self.processor.tokenizer, self._others, self.others))

    def ask(self, model: Any) -> dict[str, list[int]]:
        """Mark the answers to all questions."""
        tokenizer = self.processor.tokenizer
        return {
            task: [*map(int, score(model, tokenizer, self._asked[task], some))] for task, some in self.questions.items()
        }

    def share(self, row: Row, task: str) -> Share:
        """The share of answers that are right."""
        return share(row.marks[task], self.questions[task])

    def mean(self, row: Row) -> Share:
        """The same over all taught tasks, which have as many questions each."""
        return share([mark for task in self.taught for mark in row.marks[task]], self._all(self.taught))

    def difference(self, row: Row, other: Row, tasks: Sequence[str]) -> Share:
        """How much larger one's share is than another's, with the error of that, since both were asked the same."""
        pairs = [pair for task in tasks for pair in zip(row.marks[task], other.marks[task], strict=True)]
        return share([a - b for a, b in pairs], self._all(tasks))

    def _all(self, tasks: Sequence[str]) -> list[Question]:
        return [question for task in tasks for question in self.questions[task]]


def of_the_demo(taught: Sequence[str], pictures: int | None = None) -> Exam:
    """The questions to copies of the demo's model."""
    pairs, scans = Pairs((), split_pairs(SEED).every), load_handwriting(SEED)[1]
    every = draw_questions(pairs, scans, SEED, pictures=pictures)
    questions = {task: [q for q in every if q.kind == task] for task in ARITHMETIC}
    questions[UNTAUGHT] = [q for q in every if q.kind in PERCEPTION]
    others = draw_questions(pairs, scans, SEARCH_SEED, pictures=SEARCH_PICTURES)
    return Exam(taught, questions, [q for q in others if q.kind in taught], trained_models.load_processor(VLM))


class Kept:
    """Rows of a run that was cut short, in a file, for one that goes on with it.

    about  what all of them depend on
    """

    def __init__(self, file: Path, about: str) -> None:
        self._file, self._about = file, about
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self._rows: dict[str, tuple[str, Row]] = {}
        if found.get("about") == about:
            self._rows = {name: (what, Row(**row)) for name, (what, row) in found["rows"].items()}

    def row(self, name: str, what: str, make: Callable[[], Row]) -> Row:
        """The row of this name, if it is there and is of the same thing, or else as it is made."""
        if name in self._rows and self._rows[name][0] == what:
            return self._rows[name][1]
        row = make()
        if not row.failure:
            self._rows[name] = (what, row)
            rows = {name: [what, vars(row)] for name, (what, row) in self._rows.items()}
            beside = self._file.with_name(f"{self._file.name}.new")
            beside.write_text(json.dumps({"about": self._about, "rows": rows}), encoding="utf-8")
            beside.replace(self._file)
        return row


def contest(cases: Mapping[str, Case], made: Made, exam: Exam, kept: Kept) -> dict[str, Row]:
    """Each merge at the scale with the most right answers to other questions than those of the exam."""
    rows = {}
    for name, case in cases.items():
        rows[name] = row = kept.row(name, repr(case), partial(_of_case, case, made, exam))
        told = row.failure or f"{exam.mean(row).value:.3f} at scale {row.scale:g}, {row.as_is}, {dict(row.right)}"
        print(f"{name}: {told}", file=sys.stderr, flush=True)
    return rows


def _of_case(case: Case, made: Made, exam: Exam) -> Row:
    try:
        return _searched(case, made, exam)
    except (PolymergeError, ValueError, RuntimeError, OSError, KeyError) as error:
        return Row(failure=f"{type(error).__name__}: {error}")


def _searched(case: Case, made: Made, exam: Exam) -> Row:
    model, norm = made(case, None)
    as_is = (norm, exam.right_of_others(model))
    right: dict[float, int] = {}

    def look(places: Iterable[int]) -> None:
        """Try norms one after the other, beyond the first ones as long as each is better than all before it."""
        for place in places:
            best, wanted = max(right.values(), default=-1), NORMS[place]
            right[wanted] = exam.right_of_others(made(case, case.scale_for(wanted, norm))[0])
            if place not in FIRST and right[wanted] <= best:
                break

    look(FIRST)
    look(range(FIRST.stop, len(NORMS)) if right[NORMS[FIRST.stop - 1]] == max(right.values()) else ())
    look(range(FIRST.start - 1, -1, -1) if right[NORMS[FIRST.start]] == max(right.values()) else ())
    best = case.scale_for(min(one for one in right if right[one] == max(right.values())), norm)
    model, made_norm = made(case, best)
    tried = {f"{one:g}": right[one] for one in sorted(right)}
    return Row(exam.ask(model), made_norm, best, tried, as_is)
