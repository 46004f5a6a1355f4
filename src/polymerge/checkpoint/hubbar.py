"""The progress that huggingface_hub reports, told to a function and drawn nowhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Received", "bar_class"]


class Received:
    """How much of one file is here, told to `advance` as what came to it since it was last told.

    advance  called with a number below zero where bytes have to be fetched again; what it raises ends the download
    """

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance, self._here = advance, 0

    def add(self, more: int) -> None:
        """So many more bytes are here."""
        self._advance(more)
        self._here += more

    def stands_at(self, here: int) -> None:
        """So many bytes of it are here in all."""
        if here != self._here:
            self.add(here - self._here)


def bar_class(received: Received) -> Any:
    """A class of progress bars for huggingface_hub: each tells what is there at first, and how many bytes more come."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})
            # less than was asked for where a server sends a file from its beginning instead
            received.stands_at(int(options.get("initial") or 0))

        def update(self, n: float | None = 1) -> None:
            received.add(int(n or 0))

        # that they are there says that one bar stands for what is received and what is written, so that a byte
        # counts once
        def update_transfer(self, n: float | None = 1) -> None:
            pass

        def set_transfer_postfix_str(self, text: str = "", refresh: bool = True) -> None:
            pass

    return Bar
