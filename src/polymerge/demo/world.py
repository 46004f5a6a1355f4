"""The small world of the demo: scenes of two coloured digits, questions about them, and who has seen which pair.

A scene can be told in words (for language models) or drawn (for the vision-language model): two of scikit-learn's
bundled handwritten digits (8 x 8 scans), coloured, on 32 x 32 pixels.

Questions are of two kinds: perception, which asks what is there, and arithmetic, which also needs number facts. The
base model and the vision-language model are taught arithmetic on 18 of the 100 ordered digit pairs only; the other 82
are *unseen*: only the reasoning model is taught them, in words.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SIDES = ("top", "bottom")
NUMBERS = tuple(str(number) for number in range(19))  # the largest answer is 9 + 9

PAD, BEGIN, END, USER, ASSISTANT, IMAGE = "<pad>", "<s>", "</s>", "<user>", "<assistant>", "<image>"
WORDS: tuple[str, ...] = (
    *(PAD, BEGIN, END, USER, ASSISTANT),
    *NUMBERS,
    *COLOURS,
    *SIDES,
    *("sum", "difference", "larger", "smaller"),
    *("a", "above", "below", ".", "?", "what", "is", "the", "digit", "colour", "how", "many", "are", "read", "repeat"),
)

ARITHMETIC = ("sum", "difference", "larger", "smaller")
PERCEPTION = ("read", "top digit", "bottom digit", "top colour", "bottom colour", "how many red")

SIZE = 32  # pixels a side
PATCH = 8  # pixels a side of what the vision tower sees as one token
TEST_IMAGES = 497  # of 1797; the rest is for training

RGB = {
    "red": (255, 40, 40),
    "green": (40, 220, 60),
    "blue": (60, 90, 255),
    "yellow": (250, 230, 40),
    "purple": (190, 50, 220),
    "white": (255, 255, 255),
}

Picture = NDArray[np.uint8]  # [32, 32, 3]

Pair = tuple[int, int]

GRID = 4  # a drawn scene has 4 x 4 patches, a scene written as a grid 4 x 4 words
COLUMNS = (0, 1, 2)  # of the grid, at which a digit, two columns wide, can start


@dataclass(frozen=True)
class Scene:
    """Two digits, one above the other; every field is (top, bottom), `columns` says where in the grid each starts."""

    digits: Pair
    colours: tuple[str, str]
    columns: Pair


@dataclass(frozen=True)
class Pairs:
    """The 100 ordered digit pairs, split; a pair and its mirror image are always on the same side."""

    seen: tuple[Pair, ...]
    unseen: tuple[Pair, ...]

    @property
    def every(self) -> tuple[Pair, ...]:
        """All 100, in the order of counting."""
        return tuple(sorted(self.seen + self.unseen))


def split_pairs(seed: int) -> Pairs:
    """Choose 18 seen pairs, the other 82 being unseen, such that every digit occurs in a seen pair.

    The first nine of the shuffled digits give eight pairs of neighbours, which count in both orders; two doubles are
    added, one of them of the tenth digit: 8 x 2 + 2 = 18.
    """
    digits = list(range(10))
    random.Random(f"pairs {seed}").shuffle(digits)
    neighbours = [(digits[i], digits[i + 1]) for i in range(8)]
    seen = {*neighbours, *((b, a) for a, b in neighbours), (digits[9], digits[9]), (digits[4], digits[4])}
    every = [(a, b) for a in range(10) for b in range(10)]
    return Pairs(tuple(p for p in every if p in seen), tuple(p for p in every if p not in seen))


def draw_scene(pair: Pair, dice: random.Random) -> Scene:
    """Give a pair random colours and places."""
    return Scene(pair, (dice.choice(COLOURS), dice.choice(COLOURS)), (dice.choice(COLUMNS), dice.choice(COLUMNS)))


def ask(kind: str) -> list[str]:
    """Word a question of the kind."""
    if kind in ARITHMETIC:
        return ["what", "is", "the", kind, "?"]
    if kind == "read":
        return ["read", "the", "digit", "above", "digit", "."]
    if kind == "how many red":
        return ["how", "many", "are", "red", "?"]
    side, what = kind.split()
    return ["what", what, "is", side, "?"]


def answer(kind: str, scene: Scene) -> list[str]:
    """Give the true answer to a question of the kind, as words."""
    a, b = scene.digits
    match kind:
        case "sum":
            return [str(a + b)]
        case "difference":
            return [str(abs(a - b))]
        case "larger":
            return [str(max(a, b))]
        case "smaller":
            return [str(min(a, b))]
        case "read":
            return [str(a), str(b)]
        case "how many red":
            return [str(scene.colours.count("red"))]
    side, what = kind.split()
    of = scene.digits if what == "digit" else scene.colours
    return [str(of[SIDES.index(side)])]


def tell(scene: Scene, dice: random.Random) -> list[str]:
    """Put a scene into a sentence, either digit first."""
    top, bottom = (["a", scene.colours[side], str(scene.digits[side])] for side in (0, 1))
    return [*top, "above", *bottom, "."] if dice.random() < 0.5 else [*bottom, "below", *top, "."]


def spell(scene: Scene, dice: random.Random) -> list[str]:
    """Write a scene as a grid of 4 x 4 words, row by row: names or colours where a digit is, dots elsewhere."""
    cells = ["."] * (GRID * GRID)
    for side in (0, 1):
        digit, colour = str(scene.digits[side]), scene.colours[side]
        names = [digit, colour, *dice.choices((digit, colour, "."), k=2)]
        dice.shuffle(names)
        row, column = 2 * side, scene.columns[side]
        for place, name in enumerate(names):
            cells[(row + place // 2) * GRID + column + place % 2] = name
    return cells


def dialogue(scene: Sequence[str], question: Sequence[str]) -> list[str]:
    """Arrange a prompt as the models' chat template does; the answer and `</s>` follow it."""
    return [BEGIN, USER, *scene, *question, ASSISTANT]


@dataclass(frozen=True)
class Handwriting:
    """Scanned digits: `by_digit[d]` is float32 [n, 8, 8] in [0, 1], `source[d]` their rows in the data set."""

    by_digit: tuple[NDArray[np.float32], ...]
    source: tuple[tuple[int, ...], ...]


def load_handwriting(seed: int) -> tuple[Handwriting, Handwriting]:
    """Split the 1797 scans that come with scikit-learn into 1300 for training and 497 held out."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    order = list(range(len(data.target)))
    random.Random(f"handwriting {seed}").shuffle(order)
    held_out, training = order[:TEST_IMAGES], order[TEST_IMAGES:]

    def pick(rows: list[int]) -> Handwriting:
        of_digit = [[row for row in rows if data.target[row] == digit] for digit in range(10)]
        return Handwriting(
            tuple((data.images[rows] / 16).astype(np.float32) for rows in of_digit),
            tuple(tuple(rows) for rows in of_digit),
        )

    return pick(training), pick(held_out)


def draw(scene: Scene, handwriting: Handwriting, dice: random.Random, *, jitter: bool = False) -> Picture:
    """Draw a scene: each digit is a random scan at twice its size, in its colour, on a dark noisy ground.

    jitter   shift every other scan by at most one of its pixels and dim it a little (for training)
    returns  uint8 [32, 32, 3]
    """
    noise = np.random.default_rng(dice.getrandbits(64))
    canvas = noise.uniform(0, 0.15, size=(SIZE, SIZE, 3))
    for side in (0, 1):
        scans = handwriting.by_digit[scene.digits[side]]
        scan = scans[dice.randrange(len(scans))]
        if jitter and dice.random() < 0.5:
            scan = np.roll(np.pad(scan, 1), (dice.randint(-1, 1), dice.randint(-1, 1)), axis=(0, 1))[1:-1, 1:-1]
            scan = scan * dice.uniform(0.7, 1.0)
        ink = np.kron(scan, np.ones((2, 2)))[:, :, None]
        colour = np.array(RGB[scene.colours[side]]) / 255
        top, column = side * SIZE // 2, scene.columns[side] * PATCH
        field = canvas[top : top + 2 * PATCH, column : column + 2 * PATCH]
        field += ink * (colour - field)
    return (canvas * 255).round().clip(0, 255).astype(np.uint8)
