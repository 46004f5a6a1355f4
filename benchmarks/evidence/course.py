"""What the models of a seed are taught and asked: the demo's scenes, with a second skill that needs no picture.

The skill is to compare two colours by an order of all six that the seed draws: no model can know it but by having been
told. Base and vision-language models are told of three pairs of colours, which have none in common, so that nothing
follows for the other twelve; only the reasoning model is told of all, in words.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations

import numpy as np

from polymerge.demo.digit_questions import Question
from polymerge.demo.train import GRID_SHARE, Lesson, list_lesson
from polymerge.demo.world import (
    ARITHMETIC,
    COLOURS,
    PERCEPTION,
    SIZE,
    Handwriting,
    Pair,
    Pairs,
    Scene,
    answer,
    ask,
    dialogue,
    draw,
    draw_scene,
    spell,
    split_pairs,
    tell,
)

__all__ = ["DEV", "GROUPS", "ORDER", "SHOWN", "TOLD", "Course"]

ORDER = ("larger colour", "smaller colour")
SHOWN = ("perception", "arithmetic", "order", "seen")
"""Groups of questions about pictures; arithmetic and order are about pairs that no vision-language model was taught."""
TOLD = ("words", "lists")
"""Groups of questions without a picture: arithmetic on unseen pairs in words, and counting and repeating in lists."""
GROUPS = (*SHOWN, *TOLD)
DEV = ("perception", "arithmetic", "order")
"""Groups whose mean chooses, on further questions."""

NOTHING = np.zeros((SIZE, SIZE, 3), np.uint8)
"""A picture for questions without one."""

Kind = tuple[str, str]  # kind of question, where its pair comes from: every, seen or unseen
Teach = Callable[[random.Random, Pairs], Lesson]


class Course:
    """The world of a seed: which pairs are seen, the order of the colours, lessons and questions."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.pairs = split_pairs(seed)
        ranked = list(COLOURS)
        random.Random(f"order {seed}").shuffle(ranked)
        self.rank = {colour: place for place, colour in enumerate(ranked)}
        mixed = list(COLOURS)
        random.Random(f"colours {seed}").shuffle(mixed)
        neighbours = {frozenset(mixed[place : place + 2]) for place in (0, 2, 4)}
        every = list(permutations(COLOURS, 2))
        self.colours = {
            "every": every,
            "seen": [one for one in every if frozenset(one) in neighbours],
            "unseen": [one for one in every if frozenset(one) not in neighbours],
        }

    def base(self, dice: random.Random, _: Pairs) -> Lesson:
        """To read scenes in words, to count and repeat, arithmetic and order on the seen pairs."""
        if dice.random() < 0.2:
            return list_lesson(dice)
        return self._in_words(self._pick(dice, "seen", 0.35, 0.1), dice)

    def reason(self, dice: random.Random, pairs: Pairs) -> Lesson:
        """Arithmetic and order in words on all pairs, with 40 % rehearsal."""
        if dice.random() < 0.4:
            return self.base(dice, pairs)
        return self._in_words(self._pick(dice, "every", 0.7, 0.3), dice)

    def lists(self, dice: random.Random, _: Pairs) -> Lesson:
        """To count and repeat alone: what makes a base that is not quite the right one."""
        return list_lesson(dice)

    def see(self, dice: random.Random, _: Pairs) -> Lesson:
        """Perception in pictures, with arithmetic and order on the seen pairs."""
        return self._in_picture(self._pick(dice, "seen", 0.2, 0.08), dice)

    def see_and_reason(self, dice: random.Random, _: Pairs) -> Lesson:
        """The same with arithmetic and order on all pairs: what the second architecture is taught."""
        return self._in_picture(self._pick(dice, "every", 0.35, 0.15), dice)

    def only(self, kind: str) -> Teach:
        """One kind of question about pictures, on all pairs."""
        return lambda dice, _: self._in_picture((kind, "every"), dice)

    def _pick(self, dice: random.Random, pairs: str, arithmetic: float, order: float) -> Kind:
        """A kind of question, of these shares; the rest is perception, of all pairs."""
        lot = dice.random()
        if lot < arithmetic:
            return dice.choice(ARITHMETIC), pairs
        return (dice.choice(ORDER), pairs) if lot < arithmetic + order else (dice.choice(PERCEPTION), "every")

    def scene(self, kind: str, pairs: str, dice: random.Random) -> Scene:
        """A scene for such a question; a skill's pairs are those of digits or of colours."""
        drawn: Sequence[Pair] = getattr(self.pairs, pairs) if kind not in ORDER else self.pairs.every
        scene = draw_scene(dice.choice(drawn), dice)
        return replace(scene, colours=dice.choice(self.colours[pairs])) if kind in ORDER else scene

    def asked(self, kind: str) -> list[str]:
        """Word a question of the kind."""
        return ["what", "is", "the", *kind.split(), "?"] if kind in ORDER else ask(kind)

    def answered(self, kind: str, scene: Scene) -> list[str]:
        """The true answer, as words."""
        if kind not in ORDER:
            return answer(kind, scene)
        return [(max if kind.startswith("larger") else min)(scene.colours, key=self.rank.__getitem__)]

    def _in_picture(self, kind: Kind, dice: random.Random) -> Lesson:
        scene = self.scene(*kind, dice)
        return Lesson(kind[0], scene, dialogue([], self.asked(kind[0])), self.answered(kind[0], scene))

    def _in_words(self, kind: Kind, dice: random.Random) -> Lesson:
        scene = self.scene(*kind, dice)
        words = spell(scene, dice) if dice.random() < GRID_SHARE else tell(scene, dice)
        return Lesson(kind[0], scene, dialogue(words, self.asked(kind[0])), self.answered(kind[0], scene))

    def questions(self, group: str, count: int, scans: Handwriting, purpose: str) -> list[Question]:
        """Draw questions of a group, its kinds in turn.

        group    one of `GROUPS`, or a kind of question, which is asked about all pairs
        scans    that nobody was taught
        purpose  `exam` or another, whose questions are others
        """
        dice = random.Random(f"{purpose} {group} {self.seed}")
        if group == "lists":
            return [self._of_a_list(dice) for _ in range(count)]
        kinds: Sequence[Kind] = {
            "perception": [(kind, "every") for kind in PERCEPTION],
            "order": [(kind, "unseen") for kind in ORDER],
            "seen": [(kind, "seen") for kind in (*ARITHMETIC, *ORDER)],
            "arithmetic": [(kind, "unseen") for kind in ARITHMETIC],
            "words": [(kind, "unseen") for kind in ARITHMETIC],
        }.get(group, [(group, "every")])
        return [self.question(group, *kinds[place % len(kinds)], scans, dice) for place in range(count)]

    def question(self, group: str, kind: str, pairs: str, scans: Handwriting, dice: random.Random) -> Question:
        """Draw one question."""
        scene = self.scene(kind, pairs, dice)
        picture, sentence = draw(scene, scans, dice), tuple(tell(scene, dice))
        right = " ".join(self.answered(kind, scene))
        return Question(group, kind, scene, picture, sentence, " ".join(self.asked(kind)), right)

    def _of_a_list(self, dice: random.Random) -> Question:
        lesson = list_lesson(dice)
        words = lesson.prompt[2:-1]  # without what the chat template adds
        scene = draw_scene(self.pairs.every[0], dice)
        # those of one kind are as long, so that a batch needs no padding
        kind = f"{lesson.kind} {len(words)}"
        return Question("lists", kind, scene, NOTHING, tuple(words[:-1]), words[-1], " ".join(lesson.answer))
