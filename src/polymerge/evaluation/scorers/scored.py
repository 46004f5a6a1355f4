"""The input and output types that all scorers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from polymerge.errors import PolymergeError, RecipeError, refuse_if_any

__all__ = ["Scored", "Scorer", "averaged", "check_pairs", "texts_of"]


@dataclass(frozen=True)
class Scored:
    """A score in percent and its components.

    right    score times total / 100: a count if answers are right or wrong
    samples  each prediction's score in [0, 1], in order; None if the score is not their mean
    notes    remarks on the score
    metrics  additional numbers by name, in percent; None if unavailable
    """

    score: float
    right: float
    total: int
    samples: tuple[float, ...] | None
    notes: tuple[str, ...] = ()
    metrics: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Scorer:
    """A row of the table: its name, its measure, the source of its definition, and the function."""

    name: str
    title: str
    source: str
    score: Callable[[Sequence[str], Sequence[Any]], Scored]


def averaged(samples: Iterable[float]) -> Scored:
    """Build a score that is the mean of its samples."""
    shares = tuple(float(share) for share in samples)
    right = sum(shares)
    return Scored(100 * right / len(shares), right, len(shares), shares)


def check_pairs(predictions: Sequence[str], references: Sequence[Any]) -> None:
    """Raise RecipeError if there is nothing to score, or not exactly one text and one reference each."""
    if len(predictions) != len(references):
        raise RecipeError(f"{len(predictions)} predictions for {len(references)} references: give one of each")
    if not predictions:
        raise RecipeError("there is no prediction to score")
    refuse_if_any(
        RecipeError(f"prediction {place}: {_kind(text)}, not a text")
        for place, text in enumerate(predictions)
        if not isinstance(text, str)
    )


def texts_of(references: Sequence[Any]) -> list[tuple[str, ...]]:
    """The texts that each reference accepts: a text accepts itself, a list any of its texts.

    raises Refused with every reference that is neither, or an empty list.
    """
    found: list[tuple[str, ...]] = []
    problems: list[PolymergeError] = []
    for place, reference in enumerate(references):
        texts = (reference,) if isinstance(reference, str) else reference
        if isinstance(texts, list | tuple) and texts and all(isinstance(text, str) for text in texts):
            found.append(tuple(texts))
        else:
            problems.append(RecipeError(f"reference {place}: {_kind(reference)}, not a text or a list of texts"))
    refuse_if_any(problems)
    return found


def _kind(value: object) -> str:
    shown = repr(value)
    return f"{shown if len(shown) < 60 else shown[:57] + '...'} is a {type(value).__name__}"
