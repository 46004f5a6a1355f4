"""The progress that huggingface_hub reports, told to a function and drawn nowhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["bar_class"]


def bar_class(advance: Callable[[int], None]) -> Any:
    """A class of progress bars for huggingface_hub: each tells `advance` how many more bytes are there.

    A number below zero takes back bytes that have to be fetched again. What `advance` raises ends a plain download.
    """
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            advance(int(n or 0))

        # that they are there says that one bar stands for what is received and what is written, so that a byte
        # counts once
        def update_transfer(self, n: float | None = 1) -> None:
            pass

        def set_transfer_postfix_str(self, text: str = "", refresh: bool = True) -> None:
            pass

    return Bar
