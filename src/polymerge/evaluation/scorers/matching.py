"""Right or wrong by comparing words: equal, the same letter, contained."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from polymerge.evaluation.scorers.scored import Scored, averaged, check_pairs, texts_of

__all__ = ["containment", "exact", "exact_lower", "exact_normalised", "letter", "normalised", "parsed_letter"]


def exact(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """Equal to one of the reference's texts when both are in upper case; a blank prediction is wrong."""
    return _compared(predictions, references, str.upper)


def exact_lower(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """As `exact`, in lower case: differs for the few letters whose upper case is another letter's too."""
    return _compared(predictions, references, str.lower)


def exact_normalised(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """As `exact`, after `normalised`."""
    return _compared(predictions, references, normalised)


def normalised(text: str) -> str:
    """Lower case, blanks collapsed, quotes and the marks . ! ? taken off both ends."""
    return " ".join(text.lower().split()).strip(" \"'.!?")


def _compared(predictions: Sequence[str], references: Sequence[Any], fold: Callable[[str], str]) -> Scored:
    check_pairs(predictions, references)
    pairs = zip(predictions, texts_of(references), strict=True)
    return averaged(
        bool(fold(text).strip()) and fold(text) in {fold(answer) for answer in answers} for text, answers in pairs
    )


def containment(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """The prediction contains one of the reference's texts or is contained in one, in upper case.

    Generous: the list of all classes is right. A blank prediction is contained in everything and yet wrong, and a
    blank reference is found nowhere.
    """
    check_pairs(predictions, references)
    return averaged(
        any(_contained(text.upper(), answer.upper()) for answer in answers)
        for text, answers in zip(predictions, texts_of(references), strict=True)
    )


def _contained(text: str, answer: str) -> bool:
    return bool(text.strip()) and bool(answer.strip()) and (text in answer or answer in text)


def letter(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """The option's letter that `parsed_letter` finds is the reference's."""
    check_pairs(predictions, references)
    return averaged(
        parsed_letter(text) in answers for text, answers in zip(predictions, texts_of(references), strict=True)
    )


_SENTENCE = re.compile(r"The answer is ([A-Z]).")
"""The last dot stands for any character but a line break, and one must follow the letter."""


def parsed_letter(text: str) -> str | None:
    """The letter that a text chooses by the rule of the ScienceQA scripts, or None.

    It is the whole text (A to E), or its start as in `A. otter`, or in the one sentence `The answer is A.` anywhere
    in it (any capital).
    """
    if text in ("A", "B", "C", "D", "E"):
        return text
    if len(text) >= 3 and text[0] in "ABCDE" and text[1:3] == ". ":
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else None
