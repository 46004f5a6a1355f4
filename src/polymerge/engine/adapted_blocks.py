"""What adapters add to the elements of an expression, computed where the elements are read and nowhere kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from polymerge.checkpoints import Entry
from polymerge.engine.extents import shape_in
from polymerge.families.expressions import Adapted, Concat, Expr, Rows
from polymerge.methods import kernels

__all__ = ["Update", "Updates"]

Array = Any
Load = Callable[[Entry], Array]
"""Reads a whole tensor, [rows, columns], in the working dtype."""


@dataclass(frozen=True)
class Update:
    """An addition to the elements `start` to `stop` of an expression, which are whole rows of `width` elements.

    first   the row of the adapted tensor that the first of them is in
    """

    start: int
    stop: int
    first: int
    width: int
    a: Entry | None
    b: Entry
    scale: float
    transposed: bool


class Updates:
    """The updates of one expression; factors are read when the first block asks for them."""

    def __init__(self, expr: Expr, entries: Mapping[str, Entry], load: Load) -> None:
        self._updates = tuple(_updates(expr, entries))
        self._load, self._lock = load, threading.Lock()
        self._factors: dict[int, tuple[Array, Array]] = {}

    def __bool__(self) -> bool:
        return bool(self._updates)

    def add(self, out: Array, start: int) -> None:
        """Add to `out`, the elements from `start` on, what the adapter has for them."""
        stop = start + len(out)
        for number, update in enumerate(self._updates):
            begin, end = max(start, update.start), min(stop, update.stop)
            if begin < end:
                left, right = self._factors_of(number)
                first = update.first * update.width + begin - update.start
                kernels.add_low_rank(out[begin - start : end - start], left, right, update.scale, first)

    def _factors_of(self, number: int) -> tuple[Array, Array]:
        with self._lock:
            if number not in self._factors:
                update = self._updates[number]
                b = self._load(update.b)
                if update.a is None:
                    column = b.reshape(-1, 1)
                    self._factors[number] = column, column[:1] * 0 + 1
                elif update.transposed:
                    a = self._load(update.a)
                    self._factors[number] = kernels.transposed(a), kernels.transposed(b)
                else:
                    self._factors[number] = b, self._load(update.a)
            return self._factors[number]


def _updates(expr: Expr, entries: Mapping[str, Entry], shift: int = 0) -> Iterator[Update]:
    """The updates in an expression, in the order in which they are added, their elements counted from `shift`."""
    match expr:
        case Adapted(of, a, b, scale, transposed):
            yield from _updates(of, entries, shift)
            shape = shape_in(of, entries)
            there = entries[a] if a is not None else None
            yield Update(shift, shift + prod(shape), 0, prod(shape[1:]), there, entries[b], scale, transposed)
        case Rows(of, start, stop):
            width = prod(shape_in(of, entries)[1:])
            low, high = shift + start * width, shift + stop * width
            for one in _updates(of, entries, shift):
                begin, end = max(one.start, low), min(one.stop, high)
                if begin < end:
                    first = one.first + (begin - one.start) // one.width
                    yield Update(
                        begin - start * width, end - start * width, first, one.width, one.a, one.b, one.scale,
                        one.transposed,
                    )  # fmt: skip
        case Concat(of):
            for block in of:
                yield from _updates(block, entries, shift)
                shift += prod(shape_in(block, entries))
