"""Scorers of short answers: equality, option letter, containment, edit distance, box overlap.

ANLS: Biten et al. 2019, arXiv:1905.13648, section 5.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from polymerge.errors import RecipeError, refuse_if_any
from polymerge.evaluation.scorers.scored import Scored, averaged, check_pairs, texts_of

__all__ = [
    "Box",
    "anls",
    "anls_lmms_eval",
    "box_iou",
    "containment",
    "edit_distance",
    "exact",
    "exact_lower",
    "exact_normalised",
    "intersection_over_union",
    "letter",
    "normalised",
    "parsed_box",
    "parsed_letter",
]


def _best(predictions: Sequence[str], references: Sequence[Any], worth: Callable[[str, str], float]) -> Scored:
    """Average over predictions, each scored against the best match among its reference's texts."""
    check_pairs(predictions, references)
    pairs = zip(predictions, texts_of(references), strict=True)
    return averaged(max(worth(text, answer) for answer in answers) for text, answers in pairs)


# equal


def exact(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """Equal to one of the reference's texts in upper case; a blank prediction is wrong."""
    return _equal(predictions, references, str.upper)


def exact_lower(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """Like `exact`, but in lower case, which differs for the few letters that share an upper case with another."""
    return _equal(predictions, references, str.lower)


def exact_normalised(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """Like `exact`, after `normalised`."""
    return _equal(predictions, references, normalised)


def normalised(text: str) -> str:
    """Lower-case a text, collapse its blanks, and strip quotes and the marks . ! ? from both ends."""
    return " ".join(text.lower().split()).strip(" \"'.!?")


def _equal(predictions: Sequence[str], references: Sequence[Any], fold: Callable[[str], str]) -> Scored:
    return _best(predictions, references, lambda text, answer: bool(fold(text).strip()) and fold(text) == fold(answer))


# contained


def containment(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """The prediction contains one of the reference's texts or is contained in one, in upper case.

    Lenient: the list of all classes is right. A blank prediction is contained in everything and yet wrong, and a
    blank reference is found nowhere.
    """
    return _best(predictions, references, lambda text, answer: _contained(text.upper(), answer.upper()))


def _contained(text: str, answer: str) -> bool:
    return bool(text.strip()) and bool(answer.strip()) and (text in answer or answer in text)


# an option's letter


def letter(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """The letter found by `parsed_letter` is the reference's."""
    return _best(predictions, references, lambda text, answer: parsed_letter(text) == answer)


_SENTENCE = re.compile(r"The answer is ([A-Z]).")
"""The last dot matches any character but a line break, so one has to follow the letter."""


def parsed_letter(text: str) -> str | None:
    """The option letter of a text by the rule of the ScienceQA scripts, or None.

    It is the entire text (A to E), or its start as in `A. otter`, or in the only sentence `The answer is A.` anywhere
    in it (any capital).
    """
    if text in ("A", "B", "C", "D", "E"):
        return text
    if len(text) >= 3 and text[0] in "ABCDE" and text[1:3] == ". ":
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else None


# close by edit distance


def anls(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """ANLS by the paper's rule: trimmed, in lower case, and a distance of exactly one half scores 0."""
    return _best(predictions, references, _anls)


def _anls(text: str, answer: str) -> float:
    text, answer = text.strip().lower(), answer.strip().lower()
    longest = max(len(text), len(answer))
    distance = edit_distance(text, answer)
    return 1 - distance / longest if 2 * distance < longest else float(longest == 0)


def anls_lmms_eval(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """ANLS as in lmms-eval: one half counts, and the distance, after blanks are collapsed, is divided by raw lengths.

    So blanks around or inside an answer raise its score. For comparing with published tables only.
    """
    return _best(predictions, references, _anls_lmms_eval)


def _anls_lmms_eval(text: str, answer: str) -> float:
    longest = max(len(text), len(answer))
    distance = edit_distance(" ".join(text.lower().split()), " ".join(answer.lower().split()))
    similarity = 1 - distance / longest if longest else 1.0
    return similarity if similarity >= 0.5 else 0.0


def edit_distance(one: str, other: str) -> int:
    """The Levenshtein distance of two texts."""
    row = list(range(len(other) + 1))
    for i, character in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, against in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (character != against))
    return row[-1]


# a box

Box = tuple[Fraction, Fraction, Fraction, Fraction]

_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
_HALF = Fraction(1, 2)
_LONGEST, _LARGEST_EXPONENT = 40, 99
"""Limits of a coordinate: 1e999999999 would exhaust memory before it could be rejected."""


def box_iou(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """The box in a text and the true one have an intersection over union of at least one half.

    Decimals are taken as written, so that one half is one half; no value is clipped and no corners are swapped. A
    text with more or fewer than four numbers is wrong. `references` are four numbers, or the text of them.
    """
    check_pairs(predictions, references)
    truths = [parsed_box(str(reference)) for reference in references]
    refuse_if_any(
        RecipeError(f"reference {place}: {reference!r} is not a box of four numbers")
        for place, (reference, truth) in enumerate(zip(references, truths, strict=True))
        if truth is None
    )
    return averaged(
        box is not None and truth is not None and intersection_over_union(box, truth) >= _HALF
        for box, truth in zip(map(parsed_box, predictions), truths, strict=True)
    )


def parsed_box(text: str) -> Box | None:
    """The four numbers in a text, with any separators, or None if there are not exactly four."""
    written = _NUMBER.findall(text)
    if len(written) != 4 or not all(_is_sane(number) for number in written):
        return None
    x1, y1, x2, y2 = (Fraction(number) for number in written)
    return x1, y1, x2, y2


def _is_sane(number: str) -> bool:
    _, _, exponent = number.lower().partition("e")
    return len(number) <= _LONGEST and abs(int(exponent or 0)) <= _LARGEST_EXPONENT


def intersection_over_union(one: Box, other: Box) -> Fraction:
    """Exact intersection over union; 0 for boxes that are disjoint or have no area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return Fraction(0)
    union = _area(one) + _area(other) - width * height
    return width * height / union if union > 0 else Fraction(0)


def _area(box: Box) -> Fraction:
    return (box[2] - box[0]) * (box[3] - box[1])
