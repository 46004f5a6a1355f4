"""Progress of long commands: a bar on a terminal, an occasional plain line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from polymerge.cli.streams import say
from polymerge.errors import human_size

__all__ = ["Shown", "progress_bar"]

_SECONDS_BETWEEN_LINES = 10.0
_OF_MATRICES = "{desc}: {percentage:3.0f}%|{bar}| "


class Shown:
    """Takes the amount done and the total of a long command, and shows them with the time left.

    unit  B for bytes; anything else is counted one by one
    bar   on a terminal; else lines are printed
    """

    def __init__(self, what: str, unit: str, bar: tqdm[Any] | None = None) -> None:
        self._what, self._unit, self._bar = what, unit, bar
        self._began = self._said = time.monotonic()
        self._amount = ""
        self._matrices = ""
        self._share = 0.0
        self._done = 0

    def __call__(self, done: int, total: int) -> None:
        """Show an amount; of what is also counted in matrices, beside these."""
        sized: Callable[[int], str] = human_size if self._unit == "B" else str
        self._amount, self._done = f"{sized(done)} of {sized(total)}", done
        if self._bar is not None and not self._matrices:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
            return
        if not self._matrices:
            self._share = done / total if total else 0.0
        self._show()

    def matrices(self, done: int, total: int, share: float) -> None:
        """Show how many matrices are done; the time left follows from the `share` of their cost."""
        if self._bar is not None and not self._matrices:
            self._bar.total, self._bar.n = 1.0, 0.0
        self._matrices, self._share = f"{done} of {total} matrices", share
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        words = ", ".join(filter(None, (self._matrices, self._amount, self._rate(now), self._left(now))))
        if self._bar is not None:
            self._bar.bar_format = _OF_MATRICES + words
            self._bar.update(self._share - self._bar.n)
        elif now - self._said >= _SECONDS_BETWEEN_LINES and (self._matrices or 0 < self._share < 1):
            self._said = now
            say(f"{self._what}: {words}")

    def _rate(self, now: float) -> str:
        """How much is done in a second, of what is not counted in matrices, which cost unequally much."""
        if self._matrices or now <= self._began or not self._done:
            return ""
        rate = self._done / (now - self._began)
        return f"{human_size(rate) if self._unit == 'B' else f'{rate:.3g}'}/s"

    def _left(self, now: float) -> str:
        if not 0 < self._share < 1:
            return ""
        seconds = (now - self._began) / self._share * (1 - self._share)
        for length, unit in ((3600, "h"), (60, "min")):
            if seconds >= 2 * length:
                return f"about {seconds / length:.1f} {unit} left"
        return f"about {seconds:.0f} s left"


@contextmanager
def progress_bar(what: str, unit: str = "B") -> Iterator[Shown]:
    """Yield what shows the amount done and the total on standard error, with the time left; `unit` as for `Shown`."""
    if not sys.stderr.isatty():
        yield Shown(what, unit)
        return
    bar: tqdm[Any]
    with tqdm(desc=what, unit=unit, unit_scale=unit == "B", leave=False) as bar:
        yield Shown(what, unit, bar)
