"""What each model is taught: endless, seeded streams of questions with answers.

Only `reason_lesson` asks arithmetic about unseen pairs, and only in words. Perception is taught on all pairs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from .world import (
    ARITHMETIC,
    COLOURS,
    NUMBERS,
    PERCEPTION,
    Pair,
    Pairs,
    Scene,
    answer,
    ask,
    dialogue,
    draw_scene,
    spell,
    tell,
)


@dataclass(frozen=True)
class Lesson:
    """One question and its answer, as words; `scene` is None for questions about a mere list of words.

    In a lesson with a picture the prompt has no words for the scene; they are left to the image tokens.
    """

    kind: str
    scene: Scene | None
    prompt: list[str]
    answer: list[str]


# Of the scenes in words, those written as a grid instead of a sentence. A picture reaches the language model as a grid
# of tokens too, so a model that has read grids of words needs to change less when it learns to see, and what another
# model has learnt about words fits better: an earlier version of this world gained 13 points, 7 without grids.
GRID_SHARE = 0.6


def base_lesson(dice: random.Random, pairs: Pairs) -> Lesson:
    """What the base model learns: to read scenes in words, to count and repeat, and arithmetic on the seen pairs."""
    lot = dice.random()
    if lot < 0.35:
        return _in_words(dice.choice(ARITHMETIC), dice.choice(pairs.seen), dice)
    if lot < 0.85:
        return _in_words(dice.choice(PERCEPTION), dice.choice(pairs.every), dice)
    return _list_lesson(dice)


def reason_lesson(dice: random.Random, pairs: Pairs) -> Lesson:
    """What the reasoning model learns on top: arithmetic in words on all pairs, with 40 % rehearsal."""
    if dice.random() < 0.60:
        return _in_words(dice.choice(ARITHMETIC), dice.choice(pairs.every), dice)
    return base_lesson(dice, pairs)


def vlm_lesson(dice: random.Random, pairs: Pairs) -> Lesson:
    """What the vision-language model learns: perception in pictures, and 25 % arithmetic on the seen pairs."""
    if dice.random() < 0.25:
        return in_picture(dice.choice(ARITHMETIC), dice.choice(pairs.seen), dice)
    return in_picture(dice.choice(PERCEPTION), dice.choice(pairs.every), dice)


def in_picture(kind: str, pair: Pair, dice: random.Random) -> Lesson:
    """Ask about a scene that is to be drawn."""
    scene = draw_scene(pair, dice)
    return Lesson(kind, scene, dialogue([], ask(kind)), answer(kind, scene))


def _in_words(kind: str, pair: Pair, dice: random.Random) -> Lesson:
    scene = draw_scene(pair, dice)
    words = spell(scene, dice) if dice.random() < GRID_SHARE else tell(scene, dice)
    return Lesson(kind, scene, dialogue(words, ask(kind)), answer(kind, scene))


def _list_lesson(dice: random.Random) -> Lesson:
    """Count a word in a list, or repeat the list; here the base model meets the large numbers."""
    if dice.random() < 0.5:
        few = dice.sample(NUMBERS + COLOURS, 2)
        words = [dice.choice(few) for _ in range(dice.randint(2, 5))]
        question = ["how", "many", "are", few[0], "?"]
        return Lesson("count", None, dialogue([*words, "."], question), [str(words.count(few[0]))])
    words = [dice.choice(NUMBERS + COLOURS) for _ in range(dice.randint(2, 5))]
    return Lesson("repeat", None, dialogue([*words, "."], ["repeat", "."]), words)
