"""A section of the page, and what all of them need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from intervals import Estimate, error_within
from polymerge.charts import Series
from scorepage import table, wrapped
from verdicts_over_seeds import Advice

__all__ = ["Results", "Rows", "Section", "error_of_questions", "series_of"]

Rows = list[dict[str, Any]]
Results = Mapping[int, Rows]
"""Rows by seed."""


@dataclass(frozen=True)
class Section:
    """An experiment on the page.

    about    what was done, and what the control is
    tables   head and rows, by caption
    charts   made when they are drawn
    advices  for the top of the page
    """

    title: str
    about: str
    tables: Mapping[str, tuple[Sequence[str], list[list[str]]]]
    charts: Callable[[], Sequence[Any]]
    advices: Sequence[Advice] = ()
    notes: Sequence[str] = field(default_factory=tuple)

    def text(self, figure: str) -> str:
        """As Markdown."""
        parts = [f"## {self.title}", wrapped(self.about), f"![{self.title}]({figure})\n"]
        for caption, (head, rows) in self.tables.items():
            parts += [f"{caption}\n", *table(head, rows), ""]
        return "\n".join([*parts, *map(wrapped, self.notes)])


def series_of(values: Sequence[Estimate]) -> Series:
    sure = all(one.half is not None for one in values)
    return Series(
        [one.mean for one in values],
        [one.low for one in values] if sure else None,
        [one.high for one in values] if sure else None,
    )


def error_of_questions(exams: Sequence[Mapping[str, Any]], groups: Sequence[str]) -> str:
    """How large the error of the questions is beside that of the seeds."""
    error = fmean(error_within(exam, groups) for exam in exams)
    return (
        f"Within a seed the standard error of such a mean, for other questions to the same models, is {error:.1f} "
        "points (questions taken as independent); it is part of what intervals over seeds show."
    )
