"""ANLS: how close a text is to the nearest reference by edit distance, nothing below one half.

Biten et al. 2019, arXiv:1905.13648, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polymerge.evaluation.scorers.scored import Scored, averaged, check_pairs, texts_of

__all__ = ["anls", "anls_lmms_eval", "edit_distance"]


def anls(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """By the paper's rule: ends trimmed, lower case, and a distance of exactly one half scores 0."""
    check_pairs(predictions, references)
    return averaged(
        max(_paper(text.strip().lower(), answer.strip().lower()) for answer in answers)
        for text, answers in zip(predictions, texts_of(references), strict=True)
    )


def _paper(text: str, answer: str) -> float:
    longest = max(len(text), len(answer))
    distance = edit_distance(text, answer)
    return 1 - distance / longest if 2 * distance < longest else float(longest == 0)


def anls_lmms_eval(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """As lmms-eval prints it: one half counts, and the distance, after blanks are collapsed, is divided by raw lengths.

    So blanks around or inside an answer raise its score. For comparing with published tables only.
    """
    check_pairs(predictions, references)
    return averaged(
        max(_lmms_eval(text, answer) for answer in answers)
        for text, answers in zip(predictions, texts_of(references), strict=True)
    )


def _lmms_eval(text: str, answer: str) -> float:
    longest = max(len(text), len(answer))
    distance = edit_distance(" ".join(text.lower().split()), " ".join(answer.lower().split()))
    similarity = 1 - distance / longest if longest else 1.0
    return similarity if similarity >= 0.5 else 0.0


def edit_distance(one: str, other: str) -> int:
    """The fewest insertions, deletions and replacements of a character that make one text the other."""
    row = list(range(len(other) + 1))
    for i, character in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, against in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (character != against))
    return row[-1]
