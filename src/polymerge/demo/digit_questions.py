"""The test questions: held-out pictures, exact answers, and the standard error of the share that is right."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from polymerge.demo.world import (
    ARITHMETIC,
    PERCEPTION,
    Handwriting,
    Pair,
    Pairs,
    Picture,
    Scene,
    answer,
    ask,
    draw,
    draw_scene,
    tell,
)

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
    """A test question; language models get the sentence, vision-language models the picture."""

    group: str
    kind: str
    scene: Scene
    picture: Picture
    sentence: tuple[str, ...]
    prompt: str
    answer: str


Asked = tuple[list[int], Any]
"""A batch: the places of its questions, and what a model gets of them."""


@dataclass(frozen=True)
class Share:
    """A share of right answers with its standard error, in [0, 1], out of `count` questions."""

    value: float
    error: float
    count: int


def draw_questions(pairs: Pairs, held_out: Handwriting, seed: int, *, pictures: int | None = None) -> list[Question]:
    """Draw test questions: perception on all pairs, arithmetic on seen and on unseen pairs, on held-out scans only.

    pictures  how many pictures each pair gets for each kind; None for the number that belongs to the group
    """
    dice = random.Random(f"exam {seed}")
    of_group = {"perception": pairs.every, "unseen": pairs.unseen, "seen": pairs.seen}
    questions = []
    for group, (kinds, usual) in GROUPS.items():
        for kind in kinds:
            for pair in of_group[group]:
                for _ in range(pictures or usual):
                    scene = draw_scene(pair, dice)
                    picture, sentence = draw(scene, held_out, dice), tuple(tell(scene, dice))
                    question = Question(
                        group, kind, scene, picture, sentence, " ".join(ask(kind)), " ".join(answer(kind, scene))
                    )
                    questions.append(question)
    return questions


def score_vlm(model: Any, processor: Any, questions: Sequence[Question]) -> list[bool]:
    """Show each picture to a vision-language model; returns whether each answer is right."""
    return score(model, processor.tokenizer, in_pictures(processor, questions), questions)


def score_language_model(model: Any, tokenizer: Any, questions: Sequence[Question]) -> list[bool]:
    """Tell each scene to a language model in a sentence; returns whether each answer is right."""
    return score(model, tokenizer, told_in_words(tokenizer, questions), questions)


def in_pictures(processor: Any, questions: Sequence[Question]) -> Iterator[Asked]:
    """What a vision-language model gets of each picture and its question."""
    for places in _batches(questions):
        turns = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": questions[place].prompt}]}]
            for place in places
        ]
        yield (
            places,
            processor(
                images=[Image.fromarray(questions[place].picture) for place in places],
                text=processor.apply_chat_template(turns, add_generation_prompt=True),
                return_tensors="pt",
            ),
        )


def told_in_words(tokenizer: Any, questions: Sequence[Question]) -> Iterator[Asked]:
    """What a language model gets of each sentence and its question."""
    for places in _batches(questions):
        turns = [
            [{"role": "user", "content": " ".join((*questions[place].sentence, questions[place].prompt))}]
            for place in places
        ]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        yield places, tokenizer(text, return_tensors="pt", add_special_tokens=False)


@torch.inference_mode()
def score(
    model: Any, tokenizer: Any, asked: Iterable[Asked], questions: Sequence[Question], longest: int = LONGEST_ANSWER
) -> list[bool]:
    """Let a model answer greedily, and compare word by word, up to the end; returns whether each answer is right.

    longest  tokens of an answer, its end included
    """
    right = [False] * len(questions)
    for places, inputs in asked:
        output = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        said = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for place, words in zip(places, said, strict=True):
            right[place] = words.split() == questions[place].answer.split()
    return right


def share(right: Sequence[float], questions: Sequence[Question]) -> Share:
    """The mean of what answers score; the standard error takes questions on one pair, in either order, as a cluster.

    right  1 for right, 0 for wrong; or the difference of that between two models on the same questions
    """
    mean = sum(right) / len(right)
    residue: dict[Pair, float] = defaultdict(float)
    for one, question in zip(right, questions, strict=True):
        a, b = question.scene.digits
        residue[min(a, b), max(a, b)] += one - mean
    clusters = len(residue)
    correction = clusters / (clusters - 1) if clusters > 1 else math.inf
    error = math.sqrt(correction * sum(value**2 for value in residue.values())) / len(right)
    return Share(mean, error, len(right))


def _batches(questions: Sequence[Question]) -> Iterator[list[int]]:
    """Places of questions in batches of equally long prompts, which need no padding."""
    by_kind: dict[str, list[int]] = defaultdict(list)
    for place, question in enumerate(questions):
        by_kind[question.kind].append(place)
    for places in by_kind.values():
        for start in range(0, len(places), BATCH):
            yield places[start : start + BATCH]
