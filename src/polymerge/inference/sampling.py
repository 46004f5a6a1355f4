"""Draw the same prompts every time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

__all__ = ["draw"]

Id = TypeVar("Id", bound=int | str)


def draw(ids: Sequence[Id], count: int, seed: int = 2) -> list[Id]:
    """Draw `count` of the ids without replacement; all of them where there are no more, or where `count` is 0.

    AdaMMS (CVPR 2025), section 4.1: 100 prompts. Its code draws positions with Python's generator and seed 2; so does
    this, from the sorted ids, so that the order of a file does not matter. Whole numbers are sorted as numbers,
    and stand before texts.

    returns  in the order of the draw, as the paper's code has it; sorted where all are taken
    """
    ordered = sorted(ids, key=lambda one: (isinstance(one, str), one))
    if not count or len(ordered) <= count:
        return ordered
    return [ordered[place] for place in random.Random(seed).sample(range(len(ordered)), count)]
