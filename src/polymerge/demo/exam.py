"""The exam: held-out pictures, exact answers, and how sure one may be of the share that is right."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from .pictures import Handwriting, Picture, draw
from .world import ARITHMETIC, PERCEPTION, Pair, Pairs, Scene, answer, ask, draw_scene, tell

BATCH = 128
LONGEST_ANSWER = 3  # two words and the end

# group: the kinds asked, and how many pictures each pair gets for each kind
GROUPS: dict[str, tuple[tuple[str, ...], int]] = {
    "perception": (PERCEPTION, 1),
    "unseen": (ARITHMETIC, 4),
    "seen": (ARITHMETIC, 8),
}


@dataclass(frozen=True)
class Question:
    """One question of the exam; language models get the sentence, vision-language models the picture."""

    group: str
    kind: str
    scene: Scene
    picture: Picture
    sentence: tuple[str, ...]
    prompt: str
    answer: str


@dataclass(frozen=True)
class Share:
    """A share of right answers with its standard error, in [0, 1], out of `count` questions."""

    value: float
    error: float
    count: int


def write_exam(pairs: Pairs, held_out: Handwriting, seed: int, *, pictures: int | None = None) -> list[Question]:
    """Draw the questions: perception on all pairs, arithmetic on seen and on unseen pairs, on held-out scans only.

    pictures  how many pictures each pair gets for each kind; None for the number that belongs to the group
    """
    dice = random.Random(f"exam {seed}")
    of_group = {"perception": pairs.every, "unseen": pairs.unseen, "seen": pairs.seen}
    exam = []
    for group, (kinds, usual) in GROUPS.items():
        for kind in kinds:
            for pair in of_group[group]:
                for _ in range(pictures or usual):
                    scene = draw_scene(pair, dice)
                    picture, sentence = draw(scene, held_out, dice), tuple(tell(scene, dice))
                    question = Question(
                        group, kind, scene, picture, sentence, " ".join(ask(kind)), " ".join(answer(kind, scene))
                    )
                    exam.append(question)
    return exam


def examine_vlm(model: Any, processor: Any, exam: Sequence[Question]) -> list[bool]:
    """Show each picture to a vision-language model and mark its answer, right or not."""
    marks = [False] * len(exam)
    for places in _batches(exam):
        turns = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": exam[place].prompt}]}]
            for place in places
        ]
        inputs = processor(
            images=[Image.fromarray(exam[place].picture) for place in places],
            text=processor.apply_chat_template(turns, add_generation_prompt=True),
            return_tensors="pt",
        )
        _mark(model, processor.tokenizer, inputs, exam, places, marks)
    return marks


def examine_language_model(model: Any, tokenizer: Any, exam: Sequence[Question]) -> list[bool]:
    """Tell each scene to a language model in a sentence and mark its answer, right or not."""
    marks = [False] * len(exam)
    for places in _batches(exam):
        turns = [
            [{"role": "user", "content": " ".join((*exam[place].sentence, exam[place].prompt))}] for place in places
        ]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        _mark(model, tokenizer, inputs, exam, places, marks)
    return marks


def share(marks: Sequence[float], exam: Sequence[Question]) -> Share:
    """Average the marks; the standard error takes questions on one pair (in either order) as one cluster.

    Marks may also be differences between two models' marks on the same questions.
    """
    mean = sum(marks) / len(marks)
    residue: dict[Pair, float] = defaultdict(float)
    for mark, question in zip(marks, exam, strict=True):
        a, b = question.scene.digits
        residue[min(a, b), max(a, b)] += mark - mean
    clusters = len(residue)
    correction = clusters / (clusters - 1) if clusters > 1 else math.inf
    error = math.sqrt(correction * sum(value**2 for value in residue.values())) / len(marks)
    return Share(mean, error, len(marks))


def _batches(exam: Sequence[Question]) -> Iterator[list[int]]:
    """Give places in the exam such that all prompts of a batch are equally long: nothing needs padding."""
    by_kind: dict[str, list[int]] = defaultdict(list)
    for place, question in enumerate(exam):
        by_kind[question.kind].append(place)
    for places in by_kind.values():
        for start in range(0, len(places), BATCH):
            yield places[start : start + BATCH]


@torch.inference_mode()
def _mark(
    model: Any, tokenizer: Any, inputs: Any, exam: Sequence[Question], places: list[int], marks: list[bool]
) -> None:
    """Let the model answer greedily and compare word by word, up to the end."""
    output = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
    said = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for place, words in zip(places, said, strict=True):
        marks[place] = words.split() == exam[place].answer.split()
