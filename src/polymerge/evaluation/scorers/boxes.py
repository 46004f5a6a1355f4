"""A box in words against the true one: right from one half of intersection over union."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from polymerge.errors import PolymergeError, RecipeError, refuse_if_any
from polymerge.evaluation.scorers.scored import Scored, averaged, check_pairs

__all__ = ["Box", "box_iou", "intersection_over_union", "parsed_box"]

Box = tuple[Fraction, Fraction, Fraction, Fraction]

_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_HALF = Fraction(1, 2)
_LONGEST, _LARGEST_EXPONENT = 40, 99
"""What a coordinate may be: 1e999999999 would fill the memory before it could be found wrong."""


def box_iou(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """Whether the box of a text and the true one share at least half of what they cover together.

    Decimals are taken as written, so that one half is one half; no value is clipped and no corners are swapped. A
    text with more or fewer than four numbers is wrong. `references` are four numbers, or the text of them.
    """
    check_pairs(predictions, references)
    truths: list[Box] = []
    problems: list[PolymergeError] = []
    for place, reference in enumerate(references):
        box = parsed_box(reference if isinstance(reference, str) else str(reference))
        if box is None:
            problems.append(RecipeError(f"reference {place}: {reference!r} is not a box of four numbers"))
        else:
            truths.append(box)
    refuse_if_any(problems)
    return averaged(_right(parsed_box(text), truth) for text, truth in zip(predictions, truths, strict=True))


def _right(box: Box | None, truth: Box) -> bool:
    return box is not None and intersection_over_union(box, truth) >= _HALF


def parsed_box(text: str) -> Box | None:
    """The four numbers in a text, whatever stands between them, or None where there are not exactly four."""
    written = _NUMBER.findall(text)
    if len(written) != 4 or not all(_sane(number) for number in written):
        return None
    x1, y1, x2, y2 = (Fraction(number) for number in written)
    return x1, y1, x2, y2


def _sane(number: str) -> bool:
    _, _, exponent = number.lower().partition("e")
    return len(number) <= _LONGEST and abs(int(exponent or 0)) <= _LARGEST_EXPONENT


def intersection_over_union(one: Box, other: Box) -> Fraction:
    """The exact share, 0 for boxes that do not meet or cover nothing."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return Fraction(0)
    union = _area(one) + _area(other) - width * height
    return width * height / union if union > 0 else Fraction(0)


def _area(box: Box) -> Fraction:
    return (box[2] - box[0]) * (box[3] - box[1])
