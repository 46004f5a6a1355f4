"""Read elements of a piece from disk: expressions become runs of bytes, and runs are read into a buffer."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from polymerge.checkpoints import Entry
from polymerge.checkpoints.prefetch import fetched
from polymerge.dtypes import BITS
from polymerge.errors import CheckpointError
from polymerge.families.expressions import Adapted, Concat, Expr, LowRank, Read, Rows, Stacked, names_read, shape_of
from polymerge.methods.kernels.cpu.transpose import turn

__all__ = ["Extent", "Files", "Turned", "begins", "clip", "extents", "same_numbers", "shape_in"]

_SPARSE: Final = 8
"""How many times as much as is wanted is read at once, before it is read bit by bit."""

_COMPARED: Final = 1 << 20
"""Elements that are compared at a time."""


@dataclass(frozen=True, slots=True)
class Turned:
    """A matrix [rows, columns] that lies transposed in a file, and how many of its elements come before a run."""

    rows: int
    columns: int
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of `count` elements of one dtype in a file, one after the other from byte `offset` on.

    turned   where they are rows of a matrix that lies transposed, which matrix that is; it begins at `offset`
    """

    file: Path
    offset: int
    dtype: str
    count: int
    turned: Turned | None = None


def extents(expr: Expr, entries: Mapping[str, Entry]) -> tuple[Extent, ...]:
    """Where the elements of an expression lie, in its row-major order; what an adapter adds to them lies elsewhere."""
    match expr:
        case Read(name):
            entry = entries[name]
            return (Extent(entry.file, entry.start, entry.dtype, prod(entry.shape)),)
        case Rows(Stacked(of, True), start, stop):
            return tuple(_turned(entries[of.name], start, stop))
        case Rows(of, start, stop):
            width = prod(shape_in(of, entries)[1:])
            return tuple(clip(extents(of, entries), start * width, stop * width))
        case Concat(of):
            return tuple(extent for block in of for extent in extents(block, entries))
        case Stacked(of, True):
            count, _, rows = entries[of.name].shape
            return tuple(_turned(entries[of.name], 0, count * rows))
        case Stacked(of) | Adapted(of):
            return extents(of, entries)
        case LowRank():
            return ()


def _turned(entry: Entry, start: int, stop: int) -> Iterator[Extent]:
    """The rows `start` to `stop` of the matrices of a tensor [n, columns, rows], seen one below the other."""
    _, columns, rows = entry.shape
    size = rows * columns * BITS[entry.dtype] // 8
    while start < stop:
        matrix, first = divmod(start, rows)
        height = min(stop - start, rows - first)
        turned = Turned(rows, columns, first * columns)
        yield Extent(entry.file, entry.start + matrix * size, entry.dtype, height * columns, turned)
        start += height


def begins(counts: Iterable[int]) -> list[int]:
    """Where each of several runs begins when they are stacked, and where the last of them ends."""
    return list(accumulate(counts, initial=0))


def clip(runs: Sequence[Extent], start: int, stop: int, beginnings: Sequence[int] | None = None) -> Iterator[Extent]:
    """The parts of runs that hold elements `start` to `stop`, counted over all of them.

    beginnings   those of the runs; whoever clips the same runs many times counts them once
    """
    beginnings = beginnings or begins(run.count for run in runs)
    for place in range(max(bisect_right(beginnings, start) - 1, 0), len(runs)):
        run, position = runs[place], beginnings[place]
        if position >= stop:
            return
        first, last = max(start, position), min(stop, position + run.count)
        if first < last:
            skipped = first - position
            if run.turned is None:
                yield Extent(run.file, run.offset + skipped * BITS[run.dtype] // 8, run.dtype, last - first)
            else:
                turned = replace(run.turned, skipped=run.turned.skipped + skipped)
                yield replace(run, count=last - first, turned=turned)


def shape_in(expr: Expr, entries: Mapping[str, Entry]) -> tuple[int, ...]:
    """The shape of what an expression reads from these tensors."""
    return shape_of(expr, {name: entries[name].shape for name in names_read(expr)})


def same_numbers(one: Expr, other: Expr, entries: Mapping[str, Entry], files: Files) -> bool:
    """Whether two expressions over one input read the same bytes, which are then the same numbers.

    What an adapter adds is compared by its factors' names alone.
    """
    if one == other:
        return True
    if _adapted(one) or _adapted(other):
        return False
    left, right = extents(one, entries), extents(other, entries)
    if [(run.dtype, run.count) for run in left] != [(run.dtype, run.count) for run in right]:
        return False
    for ours, theirs in zip(left, right, strict=True):
        for start in range(0, ours.count, _COMPARED):
            block = []
            for run in (ours, theirs):
                (part,) = clip([run], start, min(start + _COMPARED, run.count))
                block.append(bytearray(part.count * BITS[part.dtype] // 8))
                files.fill(part, memoryview(block[-1]))
            if block[0] != block[1]:
                return False
    return True


def _adapted(expr: Expr) -> bool:
    match expr:
        case Adapted() | LowRank():
            return True
        case Rows(of):
            return _adapted(of)
        case Concat(of):
            return any(map(_adapted, of))
        case Read() | Stacked():
            return False


class Files:
    """Input files, each opened once; reads at an offset, from any thread, which wait for a file that is on its way.

    memory  the content of files that lie nowhere else
    """

    def __init__(self, memory: Mapping[Path, memoryview] | None = None) -> None:
        self._memory = memory or {}
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def fill(self, run: Extent, buffer: memoryview) -> None:
        """Fill a buffer with a run; raises as `read` does."""
        if run.turned is None:
            self.read(run.file, run.offset, buffer)
            return
        bits = np.dtype(f"u{BITS[run.dtype] // 8}")
        rows, columns, skipped = run.turned.rows, run.turned.columns, run.turned.skipped
        first, last = skipped // columns, -(-(skipped + run.count) // columns)
        wanted, pitch, offset = last - first, rows * bits.itemsize, run.offset + first * bits.itemsize
        if rows <= _SPARSE * wanted:
            raw = self._scratch((columns - 1) * pitch + wanted * bits.itemsize)
            self.read(run.file, offset, raw.data)
            lying = np.ndarray((columns, wanted), bits, raw.data, strides=(pitch, bits.itemsize))
        else:
            lying = self._scratch(columns * wanted * bits.itemsize).view(bits).reshape(columns, wanted)
            for column, row in enumerate(lying):
                self.read(run.file, offset + column * pitch, row.view("u1").data)
        out = np.frombuffer(buffer, bits)
        if run.count == wanted * columns:
            turn(lying, out.reshape(wanted, columns))
        else:
            begin, whole = skipped - first * columns, np.empty((wanted, columns), bits)
            turn(lying, whole)
            out[...] = whole.reshape(-1)[begin : begin + run.count]

    def read(self, file: Path, offset: int, buffer: memoryview) -> None:
        """Fill a buffer from a file; raises CheckpointError where the file has become shorter or unreadable."""
        if (held := self._memory.get(file)) is not None:
            buffer[:] = held[offset : offset + len(buffer)]
            return
        descriptor = self._descriptor(file)
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{file}: cannot be read at byte {offset + done}: {error.strerror}") from None
            if not count:
                raise CheckpointError(f"{file}: ends at byte {offset + done}; it became shorter since it was planned")
            done += count

    def _scratch(self, size: int) -> NDArray[np.uint8]:
        """Bytes of this thread, which the next call gives again: new ones would cost a fault for each page."""
        have: NDArray[np.uint8] | None = getattr(self._local, "scratch", None)
        if have is None or have.size < size:
            have = self._local.scratch = np.empty(size, np.uint8)
        return have[:size]

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def _descriptor(self, file: Path) -> int:
        found = self._descriptors.get(file)
        if found is None:
            fetched(file)  # not under the lock: others go on with what is here
            with self._lock:
                if file not in self._descriptors:
                    try:
                        self._descriptors[file] = os.open(file, os.O_RDONLY)
                    except OSError as error:
                        raise CheckpointError(f"{file}: cannot be opened: {error.strerror}") from None
                found = self._descriptors[file]
        return found
