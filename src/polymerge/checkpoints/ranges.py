"""Files that are read by ranges of bytes, on a disk or in an object store, there with chunks read ahead.

A request to a store takes as long as reading megabytes does, and a merge reads blocks of two: so whole chunks are asked
for, the next ones of the file before they are needed. They are kept, up to a bound for all files together, until others
need the room.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

from polymerge.checkpoints.bounds import open_descriptor
from polymerge.checkpoints.stores import Stored, read_range, stored_at

__all__ = ["Ranges", "open_ranges", "opened_ranges"]

_CHUNK: Final = 8 << 20
_AHEAD: Final = 2
_BEHIND: Final = 16  # chunks by which threads that read one file may be apart
_KEPT: Final = 32
"""Chunks of all files together: 256 MiB."""
_AT_ONCE: Final = 12


class Ranges(Protocol):
    """A file of `size` bytes that is read at offsets, from any thread."""

    size: int

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Read bytes from an offset on; returns how many, 0 at the end of the file."""

    def pread_all(self, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """The bytes at several places (offset, count), without any others; fewer at the end of the file."""

    def close(self) -> None:
        """Release what reading needs."""


def open_ranges(file: Path) -> Ranges:
    """Open a regular file, or the object that a path stands for; raises OSError if it cannot be opened."""
    stored = stored_at(file)
    return _LocalFile(file) if stored is None else _StoredFile(stored)


@contextmanager
def opened_ranges(file: Path) -> Iterator[Ranges]:
    """Open a file as `open_ranges` does, for the duration of the block."""
    ranges = open_ranges(file)
    try:
        yield ranges
    finally:
        ranges.close()


class _LocalFile:
    """A file on a disk; what the system refuses is an OSError.

    The system reads ahead by itself, but for 128 KiB or so, which a merge has used up before the next block of the same
    file is wanted: so it is told of the next chunks, and the disk is busy while others compute.
    """

    def __init__(self, file: Path) -> None:
        self._descriptor = open_descriptor(file)
        self.size = os.fstat(self._descriptor).st_size
        self._told = 0

    def read_into(self, buffer: memoryview, offset: int) -> int:
        number = (offset + len(buffer)) // _CHUNK
        last, told = number + _AHEAD, self._told
        if last > told or last < told - _BEHIND:  # a second pass begins anew
            first = told + 1 if number < told < last else number
            self._told = last
            if hasattr(os, "posix_fadvise"):
                length = (last + 1 - first) * _CHUNK
                os.posix_fadvise(self._descriptor, first * _CHUNK, length, os.POSIX_FADV_WILLNEED)
        return os.preadv(self._descriptor, [buffer], offset)

    def pread_all(self, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        return (os.pread(self._descriptor, count, offset) for offset, count in places)

    def close(self) -> None:
        os.close(self._descriptor)


class _StoredFile:
    """An object in a store; what the store refuses is a CheckpointError or RecipeError."""

    def __init__(self, stored: Stored) -> None:
        self._stored, self.size = stored, stored.size

    def read_into(self, buffer: memoryview, offset: int) -> int:
        if offset >= self.size or not buffer:
            return 0
        number, skipped = divmod(offset, _CHUNK)
        chunk = _chunks.wanted(self._stored, number)
        for ahead in range(number + 1, min(number + _AHEAD, (self.size - 1) // _CHUNK) + 1):
            _chunks.wanted(self._stored, ahead)
        part = memoryview(chunk.result())[skipped : skipped + len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def pread_all(self, places: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        def read(place: tuple[int, int]) -> bytes:
            start, stop = place[0], min(sum(place), self.size)
            return read_range(self._stored, start, stop) if stop > start else b""

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            yield from pool.map(read, places)

    def close(self) -> None:
        _chunks.forget(self._stored)


class _Chunks:
    """The chunks of objects that are here or on their way, the one that was wanted last at the end."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[Stored, int], Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def wanted(self, stored: Stored, number: int) -> Future[bytes]:
        key = stored, number
        with self._lock:
            chunk = self._held.get(key)
            if chunk is None or (chunk.done() and (chunk.cancelled() or chunk.exception() is not None)):
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(_AT_ONCE, "polymerge-store")
                start = number * _CHUNK
                chunk = self._pool.submit(read_range, stored, start, min(start + _CHUNK, stored.size))
                self._held[key] = chunk
            self._held.move_to_end(key)
            while len(self._held) > _KEPT:
                self._held.popitem(last=False)  # whoever waits for it has it
        return chunk

    def forget(self, stored: Stored) -> None:
        """Drop all of one object."""
        with self._lock:
            for key in [key for key in self._held if key[0] == stored]:
                del self._held[key]


_chunks: Final = _Chunks()
