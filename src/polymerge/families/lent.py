"""Read expressions over the tensors of another input: the rows of a vocabulary that one model lends to another.

An input's expressions go by its own tensor names. Those of another input are called by its number in the plan and their
name there, `@2/model.embed_tokens.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, TypeVar

from polymerge.families.expressions import (
    Adapted,
    Concat,
    Expr,
    LowRank,
    Mean,
    Read,
    Rows,
    Scaled,
    Stacked,
)

__all__ = ["LENT_BY", "across", "lender", "of_input"]

V = TypeVar("V")

LENT_BY: Final = re.compile(r"@(\d{1,6})/")
"""What the name of a lent tensor begins with."""


def of_input(expr: Expr, place: int) -> Expr:
    """An expression of the input with this number, as another input's expressions can contain it."""

    def lent(name: str) -> str:
        return f"@{place}/{name}"

    match expr:
        case Read(name):
            return Read(lent(name))
        case Scaled(Read(name), by, block):
            return Scaled(Read(lent(name)), lent(by), block)
        case Rows(of, start, stop):
            return Rows(of_input(of, place), start, stop)
        case Concat(of):
            return Concat(tuple(of_input(block, place) for block in of))
        case Mean(of):
            return Mean(tuple(of_input(one, place) for one in of))
        case Stacked(of, transposed):
            stored = of_input(of, place)
            assert isinstance(stored, Read | Scaled)
            return Stacked(stored, transposed)
        case Adapted(of, a, b):
            return replace(expr, of=of_input(of, place), a=None if a is None else lent(a), b=lent(b))
        case LowRank(a, b, _, bias):
            return replace(expr, a=lent(a), b=lent(b), bias=None if bias is None else lent(bias))


def lender(name: str, place: int) -> tuple[int, str]:
    """The input that has a tensor which input `place` reads by this name, and the tensor's name there."""
    found = LENT_BY.match(name)
    return (place, name) if found is None else (int(found[1]), name[found.end() :])


def across(tables: Sequence[Mapping[str, V]]) -> list[Mapping[str, V]]:
    """Tables of each input's tensors that also know the names of what is lent to it; only its own are iterated."""
    return [_Across(tables, place) for place in range(len(tables))]


class _Across(Mapping[str, V]):
    def __init__(self, tables: Sequence[Mapping[str, V]], place: int) -> None:
        self._tables, self._place, self._own = tables, place, tables[place]

    def __getitem__(self, name: str) -> V:
        if name in self._own:
            return self._own[name]
        place, own = lender(name, self._place)
        if place == self._place or place >= len(self._tables):
            raise KeyError(name)
        return self._tables[place][own]

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)
