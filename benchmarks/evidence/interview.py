"""Ask merges that are made in memory, one loaded template for all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import polymerge
from course import DEV, GROUPS, TOLD, Course
from polymerge.demo.after_merging import write_questions
from polymerge.demo.digit_questions import Asked, Question, in_pictures, score, told_in_words
from polymerge.demo.story import EXCLUDED
from polymerge.demo.trained_models import load_processor
from polymerge.demo.world import load_handwriting
from polymerge.inference.live import LiveModel
from sizes import Size

__all__ = ["GENERATION", "TEXT", "Interview", "Right", "prompt_file"]

Right = dict[str, tuple[int, int]]
"""By group how many answers are right, of how many."""

TEXT = {"parts": ["text"], "exclude": EXCLUDED}
"""Of a recipe: all but embedding and head, whose rows are of one vocabulary here, as the papers have it."""

LONGEST = 6  # tokens of an answer: a list of five and the end
GENERATION = polymerge.Generation(max_new_tokens=3, batch_size=100, torch_threads=1, dtype="float32")


class Interview:
    """A vision-language model in memory, the questions of a seed, and the answers of what is merged into it.

    folder  of the seed's models
    first   a recipe with the template of all to come
    """

    def __init__(self, course: Course, size: Size, folder: Path, first: Mapping[str, Any]) -> None:
        self.course, self.size = course, size
        self.scans = load_handwriting(course.seed)[1]
        self.processor = load_processor(folder / "vlm")
        self._asked: dict[tuple[str, str], tuple[list[Question], list[Asked]]] = {}
        plan = polymerge.plan(first)
        self._live = LiveModel(plan, dtype="float32", threads=1)
        self.model = self._live.model
        self._before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def __enter__(self) -> Interview:
        return self

    def __exit__(self, *_: object) -> None:
        self._live.close()

    def merge(self, recipe: Mapping[str, Any] | polymerge.Recipe) -> float:
        """Give the model the weights of a merge; returns the norm of what it changes of the template."""
        self._live.set(polymerge.plan(recipe))
        return self.distance(self._before)

    def distance(self, other: Mapping[str, Tensor]) -> float:
        """The Frobenius norm of what the model, as it is now, and another with the same tensors differ by."""
        own = self.model.state_dict()
        squares = [float((tensor.double() - other[name].double()).square().sum()) for name, tensor in own.items()]
        return math.sqrt(sum(squares))

    def questions(self, group: str, purpose: str = "exam", count: int | None = None) -> list[Question]:
        """The questions of a group."""
        return self._prepared(group, purpose, count)[0]

    def marks(self, group: str, purpose: str = "exam", count: int | None = None) -> list[bool]:
        """Whether each answer of the model as it is now is right."""
        questions, asked = self._prepared(group, purpose, count)
        longest = LONGEST if group == "lists" else GENERATION.max_new_tokens
        return score(self.model, self.processor.tokenizer, asked, questions, longest)

    def exam(self, groups: Iterable[str] = GROUPS) -> Right:
        """Ask all questions of some groups."""
        marks = {group: self.marks(group) for group in groups}
        return {group: (sum(one), len(one)) for group, one in marks.items()}

    def dev(self, groups: Sequence[str] = DEV) -> Right:
        """Ask the further questions that choose."""
        found = {group: self.marks(group, "dev", self.size.dev // len(groups)) for group in groups}
        return {group: (sum(one), len(one)) for group, one in found.items()}

    @torch.inference_mode()
    def entropy(self, group: str, purpose: str, count: int) -> float:
        """The mean entropy of the first word of the answers, in nats: how sure the model is, right or wrong."""
        questions, asked = self._prepared(group, purpose, count)
        total = 0.0
        for _, inputs in asked:
            shares = torch.log_softmax(self.model(**inputs).logits[:, -1].double(), dim=-1)
            total -= float((shares.exp() * shares).sum())
        return total / len(questions)

    def _prepared(self, group: str, purpose: str, count: int | None) -> tuple[list[Question], list[Asked]]:
        if (group, purpose) not in self._asked:
            number = self.size.exam[group] if count is None else count
            questions = self.course.questions(group, number, self.scans, purpose)
            told = group in TOLD
            made = (
                told_in_words(self.processor.tokenizer, questions) if told else in_pictures(self.processor, questions)
            )
            self._asked[group, purpose] = questions, list(made)
        return self._asked[group, purpose]


def prompt_file(course: Course, groups: Mapping[str, int], purpose: str, folder: Path) -> Path:
    """Write questions about pictures as a file of prompts, its pictures beside it.

    groups  how many of each
    """
    scans = load_handwriting(course.seed)[1]
    questions = [one for group, count in groups.items() for one in course.questions(group, count, scans, purpose)]
    return write_questions(questions, folder)
