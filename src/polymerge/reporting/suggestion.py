"""One thing to try next, with the numbers that it rests on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Suggestion", "percent"]


@dataclass(frozen=True)
class Suggestion:
    """What to try.

    about    the run that it is about
    title    what to do
    text     why
    numbers  what it rests on, by name; never empty
    """

    about: str
    title: str
    text: str
    numbers: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.numbers:
            raise ValueError(f"nothing is suggested without a number: {self.title}")


def percent(share: float, digits: int = 0) -> str:
    """A share as people read it: `29 %`."""
    return f"{100 * share:.{digits}f} %"
