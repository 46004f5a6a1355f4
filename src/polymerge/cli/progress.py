"""Progress of long commands: a bar on a terminal, an occasional plain line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from polymerge.cli.streams import say
from polymerge.errors import human_size

__all__ = ["progress_bar"]

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress_bar(what: str, unit: str = "B") -> Iterator[Callable[[int, int], None]]:
    """Yield a function that takes the amount done and the total, and shows them on standard error with the time left.

    unit  B for bytes; anything else is counted one by one
    """
    if sys.stderr.isatty():
        with tqdm(desc=what, unit=unit, unit_scale=unit == "B", leave=False) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield show
        return
    began = said = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= _SECONDS_BETWEEN_LINES and 0 < done < total:
            said = now
            left = (now - began) / done * (total - done)
            count = f"{human_size(done)} of {human_size(total)}" if unit == "B" else f"{done} of {total}"
            say(f"{what}: {count}, about {left:.0f} s left")

    yield tell
