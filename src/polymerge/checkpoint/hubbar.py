"""The progress that huggingface_hub reports, told to a function and drawn nowhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Received", "bar_class"]


class Received:
    """How much of one file is here, told to `advance` as what came to it since it was last told.

    advance  called with a number below zero where bytes have to be fetched again; what it raises ends the download
    size     of the file, where it is known; of what comes beyond it nothing is told
    """

    def __init__(self, advance: Callable[[int], None], size: int | None = None) -> None:
        self._advance, self._size, self._here = advance, size, 0
        self.most = 0
        """Bytes of it that were here at once, at best; a download that breaks gets on as long as it grows."""
        self.fetched = False
        """Whether any of its bytes came from the hub."""
        self.let_go: Callable[[], None] = lambda: None
        """Ends what waits for its bytes, from another thread."""

    def add(self, more: int) -> None:
        """So many more bytes are here."""
        self.fetched |= more > 0
        self._tell(more if self._size is None else min(more, self._size - self._here))

    def _tell(self, more: int) -> None:
        self._advance(more)
        self._here += more
        self.most = max(self.most, self._here)

    def stands_at(self, here: int) -> None:
        """So many bytes of it are here in all."""
        if here != self._here:
            self._tell(here - self._here)


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
