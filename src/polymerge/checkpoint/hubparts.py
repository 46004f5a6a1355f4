"""What is here of a file of the hub that is not whole yet: one process at a time writes to it, and sees what comes."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

__all__ = ["Part", "TakenOverError", "TooLongError", "left", "locked", "sha256_of", "take_over"]

_LOOK: Final = 1.0  # seconds after which whoever waits for another process looks whether the file is still wanted
_QUIET: Final = 5.0  # seconds after which it says what it waits for
_CHUNK: Final = 1 << 22


class TakenOverError(Exception):
    """Another process writes to the file, under another name."""


class TooLongError(Exception):
    """More comes than the file is long."""


class Part(io.BufferedWriter):
    """A file that is written to as long as it has its name, and up to the length that it is to have.

    Its sha256 is computed as it is written, so that it need not be read for that; what it has already is read once.

    looked  called now and then while it is read; what it raises ends that

    raises TakenOverError where it has lost its name.
    """

    def __init__(self, place: Path, size: int, looked: Callable[[], None]) -> None:
        try:
            super().__init__(io.FileIO(place, "ab"))
        except FileNotFoundError:
            raise TakenOverError from None
        self._place, self._size, self._looked = place, size, looked
        self._sum = _summed(place, self.tell(), looked)

    @property
    def sha256(self) -> str:
        """Of all that is in it."""
        return str(self._sum.hexdigest())

    def write(self, data: Any, /) -> int:
        """Append to it; raises TooLongError where it does not fit."""
        if not os.path.lexists(self._place):
            raise TakenOverError
        if self.tell() + len(data) > self._size:
            raise TooLongError
        written = super().write(data)
        self._sum.update(data)
        return written

    def truncate(self, size: int | None = None, /) -> int:
        """Drop what is behind its position, or behind `size`."""
        length = super().truncate(size)
        self._sum = _summed(self._place, length, self._looked)
        return length


def sha256_of(file: Path, looked: Callable[[], None]) -> str:
    """The sha256 of a whole file; `looked` as for a `Part`."""
    return str(_summed(file, file.stat().st_size, looked).hexdigest())


def _summed(file: Path, length: int, looked: Callable[[], None]) -> Any:
    found = hashlib.sha256()
    if length:
        with file.open("rb", buffering=0) as stream:
            while length and (piece := stream.read(min(_CHUNK, length))):
                looked()
                found.update(piece)
                length -= len(piece)
    return found


def take_over(blob: Path, size: int) -> Path:
    """What was left of a file, under a new name; the rest is removed, for there is nobody else while the lock is held.

    The new name is for file systems where locks do not hold: who writes under the old one finds it gone, and stops.
    What another user has left in a cache that several share is of no use where it cannot be written to.
    """
    blob.parent.mkdir(parents=True, exist_ok=True)
    mine = blob.with_name(f"{blob.name}.polymerge-{uuid4().hex[:8]}.incomplete")
    for length, part in sorted(left(blob), reverse=True):
        try:
            if length <= size and not mine.exists():
                part.open("r+b").close()
                part.rename(mine)
                continue
        except FileNotFoundError:
            continue
        except PermissionError:
            pass
        with suppress(FileNotFoundError, PermissionError):
            part.unlink()
    mine.touch()
    return mine


def left(blob: Path) -> list[tuple[int, Path]]:
    """What earlier processes have left of a file, with the length of each."""
    found = []
    for part in blob.parent.glob(f"{blob.name}.polymerge-*.incomplete"):
        with suppress(FileNotFoundError):
            found.append((part.stat().st_size, part))
    return found


@contextmanager
def locked(file: Path, looked: Callable[[], None]) -> Iterator[None]:
    """Hold the lock that huggingface_hub takes for a blob; who waits for it long says so, who waits in vain is let go.

    looked  called now and then while it waits; what it raises ends that
    """
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    file.parent.mkdir(parents=True, exist_ok=True)
    begun, said = time.monotonic(), False
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(WeakFileLock(file, timeout=_LOOK))
                break
            except TimeoutError:
                looked()
            if not said and time.monotonic() - begun >= _QUIET:
                said = True
                logging.getLogger(__name__).warning("waiting for another process that fetches the same file: %s", file)
        yield
