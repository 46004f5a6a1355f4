"""Scenes as pictures: two of scikit-learn's bundled handwritten digits (8 x 8 scans), coloured, on 32 x 32 pixels."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .world import Scene

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
