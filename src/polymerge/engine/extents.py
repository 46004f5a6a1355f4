"""Map between tensors and files: turn expressions into extents of bytes, read them into buffers, and write rows.

If a matrix is stored transposed, its rows are columns in the file, both for reading and for writing.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from polymerge.checkpoints import TensorInfo
from polymerge.checkpoints.prefetch import fetched
from polymerge.checkpoints.ranges import Ranges, open_ranges
from polymerge.checkpoints.writer import Write
from polymerge.dtypes import BITS
from polymerge.errors import CheckpointError
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
    names_read,
    shape_of,
)
from polymerge.methods import kernels
from polymerge.methods.kernels.cpu.matrices import transpose
from polymerge.planning import Step

__all__ = ["Extent", "Files", "Scales", "TransposedWriter", "begins", "clip", "extents", "same_numbers", "shape_in"]

_SPARSE: Final = 8
"""A read may fetch up to this many times the wanted bytes; beyond that, many small reads are cheaper."""

_KEPT: Final = 6
"""Factors that are kept from one expert to the next: of two adapters, or of two parameters of one, and a few more."""

_COMPARED: Final = 1 << 20
"""Elements compared at a time."""


@dataclass(frozen=True, slots=True)
class Transposed:
    """A matrix [rows, columns] that is stored transposed, and the number of its elements before an extent."""

    rows: int
    columns: int
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales that the elements of an extent, which are of one matrix, are multiplied by.

    stored      the scales of all matrices [matrices, rows, columns] of a tensor, and the index of this one's
    transposed  whether they are to be transposed, as the matrix is
    block       rows and columns of the matrix that one scale is for
    width       elements in a row of the matrix
    skipped     elements of the matrix before the extent
    """

    stored: TensorInfo
    shape: tuple[int, int, int]
    matrix: int
    transposed: bool
    block: tuple[int, int]
    width: int
    skipped: int


@dataclass(frozen=True, slots=True)
class Extent:
    """`count` consecutive elements of one dtype in a file, starting at byte `offset`.

    transposed   the matrix, if the elements are rows of one that is stored transposed; it begins at `offset`
    scales       what they are to be multiplied by, if anything
    others       as many elements each, of which and these the mean is meant
    """

    file: Path
    offset: int
    dtype: str
    count: int
    transposed: Transposed | None = None
    scales: Scales | None = None
    others: tuple[Extent, ...] = ()


def extents(expr: Expr, entries: Mapping[str, TensorInfo]) -> tuple[Extent, ...]:
    """The extents of an expression's elements, in row-major order, without adapters' updates."""
    match expr:
        case Read(name):
            entry = entries[name]
            return (Extent(entry.file, entry.start, entry.dtype, prod(entry.shape)),)
        case Rows(Stacked(_, transposed) as of, start, stop) if transposed or isinstance(of.of, Scaled):
            return tuple(_of_matrices(of, entries, start, stop))
        case Rows(of, start, stop):
            width = prod(shape_in(of, entries)[1:])
            return tuple(clip(extents(of, entries), start * width, stop * width))
        case Concat(of):
            return tuple(extent for block in of for extent in extents(block, entries))
        case Mean(of):
            return tuple(_side_by_side([extents(one, entries) for one in of]))
        case Scaled():
            return tuple(_of_matrices(expr, entries, 0, prod(shape_in(expr, entries)[:-1])))
        case Stacked(of, transposed) if transposed or isinstance(of, Scaled):
            return tuple(_of_matrices(expr, entries, 0, shape_in(expr, entries)[0]))
        case Stacked(of) | Adapted(of):
            return extents(of, entries)
        case LowRank():
            return ()


def _side_by_side(several: Sequence[tuple[Extent, ...]]) -> Iterator[Extent]:
    """The extents of several expressions of one shape, cut at the ends of each."""
    for start, stop in pairwise(sorted({edge for runs in several for edge in begins(run.count for run in runs)})):
        first, *others = (part for runs in several for part in clip(runs, start, stop))
        yield replace(first, others=tuple(others))


def _of_matrices(view: Stacked | Scaled, entries: Mapping[str, TensorInfo], start: int, stop: int) -> Iterator[Extent]:
    """Rows `start` to `stop` of the matrices of a tensor, one below the other: one extent for each matrix."""
    of, flip = (view.of, view.transposed) if isinstance(view, Stacked) else (view, False)
    entry = entries[names_read(of)[0]]
    rows, columns = entry.shape[:-3:-1] if flip else entry.shape[-2:]
    size = rows * columns * BITS[entry.dtype] // 8
    while start < stop:
        matrix, first = divmod(start, rows)
        height, skipped = min(stop - start, rows - first), first * columns
        begin = matrix * size + (0 if flip else skipped * BITS[entry.dtype] // 8)
        yield Extent(
            entry.file,
            entry.start + begin,
            entry.dtype,
            height * columns,
            Transposed(rows, columns, skipped) if flip else None,
            _scales(of, entry.shape, entries[of.by], matrix, flip, skipped) if isinstance(of, Scaled) else None,
        )
        start += height


def _scales(
    of: Scaled, shape: tuple[int, ...], stored: TensorInfo, matrix: int, transposed: bool, skipped: int
) -> Scales:
    """The scales of one matrix of a tensor of this shape."""
    many, height, breadth = (1, *of.block)[-3:]
    count, rows, columns = (1, *shape)[-3:]
    grid = -(-count // many), -(-rows // height), -(-columns // breadth)
    block, width = ((breadth, height), rows) if transposed else ((height, breadth), columns)
    if stored.dtype == "U8":  # what PyTorch has had a dtype for only since 2.7
        stored = replace(stored, dtype="F8_E8M0")
    return Scales(stored, grid, matrix // many, transposed, block, width, skipped)


def begins(counts: Iterable[int]) -> list[int]:
    """The start of each of several stacked runs, and the end of the last one."""
    return list(accumulate(counts, initial=0))


def clip(runs: Sequence[Extent], start: int, stop: int, beginnings: Sequence[int] | None = None) -> Iterator[Extent]:
    """The parts of runs that hold elements `start` to `stop`, counted over all runs.

    beginnings   `begins` of the runs, for callers that clip the same runs repeatedly
    """
    beginnings = beginnings or begins(run.count for run in runs)
    for place in range(max(bisect_right(beginnings, start) - 1, 0), len(runs)):
        run, position = runs[place], beginnings[place]
        if position >= stop:
            return
        first, last = max(start, position), min(stop, position + run.count)
        if first < last:
            yield _part(run, first - position, last - first)


def _part(run: Extent, skipped: int, count: int) -> Extent:
    """The `count` elements of a run that come after its first `skipped` ones."""
    scales = run.scales and replace(run.scales, skipped=run.scales.skipped + skipped)
    others = tuple(_part(other, skipped, count) for other in run.others)
    if run.transposed is None:
        offset = run.offset + skipped * BITS[run.dtype] // 8
        return Extent(run.file, offset, run.dtype, count, scales=scales, others=others)
    transposed = replace(run.transposed, skipped=run.transposed.skipped + skipped)
    return replace(run, count=count, transposed=transposed, scales=scales, others=others)


def shape_in(expr: Expr, entries: Mapping[str, TensorInfo]) -> tuple[int, ...]:
    """The shape that an expression has for these tensors."""
    return shape_of(expr, {name: entries[name].shape for name in names_read(expr)})


def same_numbers(one: Expr, other: Expr, entries: Mapping[str, TensorInfo], files: Files) -> bool:
    """Return whether two expressions over one input read the same bytes, and thus the same values.

    Adapters' updates and scales are compared only by the names of their tensors.
    """
    if one == other:
        return True
    if _computed(one) or _computed(other):
        return False
    left, right = ([part for run in extents(expr, entries) for part in (run, *run.others)] for expr in (one, other))
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


def _computed(expr: Expr) -> bool:
    """Return whether the values of an expression are not those of a file alone."""
    match expr:
        case Adapted() | LowRank() | Scaled():
            return True
        case Rows(of) | Stacked(of):
            return _computed(of)
        case Concat(of) | Mean(of):
            return any(map(_computed, of))
        case Read():
            return False


class Files:
    """Input files, each opened once; thread-safe reads at an offset, which wait for files being downloaded.

    memory  the content of files that exist only in memory
    """

    def __init__(self, memory: Mapping[Path, memoryview] | None = None) -> None:
        self._memory = memory or {}
        self._opened: dict[Path, Ranges] = {}
        self._held: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._local = threading.local()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def blocks(self, entry: TensorInfo, size: int) -> Iterator[NDArray[np.uint8]]:
        """A tensor's bytes, `size` at a time; each array is valid until the next. Raises as `read` does."""
        buffer = np.empty(min(size, entry.nbytes), np.uint8)
        for start in range(0, entry.nbytes, size):
            part = buffer[: entry.nbytes - start]
            self.read(entry.file, entry.start + start, part.data)
            yield part

    def kept(self, key: Hashable, load: Callable[[], Any]) -> Any:
        """What `load` returns, from the last few calls if it was among them; two threads may both load it."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        value = load()
        with self._lock:
            self._held[key] = value
            while len(self._held) > _KEPT:
                self._held.popitem(last=False)
        return value

    def numbers(self, tensor: TensorInfo) -> tuple[NDArray[Any], NDArray[Any], bool]:
        """A whole tensor: its bytes, its float32 numbers in its shape, and whether all are finite; raises as `read`."""
        raw: NDArray[Any] = np.empty(tensor.nbytes, np.uint8)
        self.read(tensor.file, tensor.start, raw.data)
        values: NDArray[Any] = np.empty(prod(tensor.shape), np.float32)
        finite = kernels.decode(raw, tensor.dtype, values)
        return raw, values.reshape(tensor.shape), finite

    def fill(self, run: Extent, buffer: memoryview) -> None:
        """Fill a buffer from an extent; raises as `read` does."""
        if run.transposed is None:
            self.read(run.file, run.offset, buffer)
            return
        bits = np.dtype(f"u{BITS[run.dtype] // 8}")
        rows, columns, skipped = run.transposed.rows, run.transposed.columns, run.transposed.skipped
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
            transpose(lying, out.reshape(wanted, columns))
        else:
            begin, whole = skipped - first * columns, np.empty((wanted, columns), bits)
            transpose(lying, whole)
            out[...] = whole.reshape(-1)[begin : begin + run.count]

    def read(self, file: Path, offset: int, buffer: memoryview) -> None:
        """Fill a buffer from a file; raises CheckpointError if the file was truncated or cannot be read."""
        if (held := self._memory.get(file)) is not None:
            buffer[:] = held[offset : offset + len(buffer)]
            return
        ranges = self._ranges(file)
        done = 0
        while done < len(buffer):
            try:
                count = ranges.read_into(buffer[done:], offset + done)
            except OSError as error:
                raise CheckpointError(f"{file}: cannot be read at byte {offset + done}: {error.strerror}") from None
            if not count:
                raise CheckpointError(f"{file}: ends at byte {offset + done}; it was truncated since it was planned")
            done += count

    def _scratch(self, size: int) -> NDArray[np.uint8]:
        """A buffer of this thread, reused by the next call, which avoids a page fault for each page."""
        have: NDArray[np.uint8] | None = getattr(self._local, "scratch", None)
        if have is None or have.size < size:
            have = self._local.scratch = np.empty(size, np.uint8)
        return have[:size]

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            while self._opened:
                self._opened.popitem()[1].close()

    def _ranges(self, file: Path) -> Ranges:
        found = self._opened.get(file)
        if found is None:
            fetched(file)  # not under the lock: others go on with what is here
            with self._lock:
                if file not in self._opened:
                    try:
                        self._opened[file] = open_ranges(file)
                    except OSError as error:
                        raise CheckpointError(f"{file}: cannot be opened: {error.strerror}") from None
                found = self._opened[file]
        return found


@dataclass
class _Begun:
    """A matrix in file layout, and the number of rows still missing."""

    lying: NDArray[Any]
    missing: int


class TransposedWriter:
    """Collects the rows of each matrix, from any thread, and writes a matrix once it is complete.

    Writing by column would take a call for every few hundred bytes.

    write   as for `execute`
    """

    def __init__(self, write: Write) -> None:
        self._write, self._lock = write, threading.Lock()
        self._begun: dict[tuple[str, int], _Begun] = {}
        self._done: list[NDArray[Any]] = []

    def put(self, step: Step, row: int, raw: memoryview) -> None:
        """Add full rows of one matrix of a transposed tensor, starting at row `row` of the tensor's view."""
        _, columns, rows = step.shape
        matrix, first = divmod(row, rows)
        bits = np.dtype(f"u{BITS[step.dtype] // 8}")
        block = np.frombuffer(raw, bits).reshape(-1, columns)
        with self._lock:
            begun = self._begun.get((step.name, matrix))
            if begun is None:
                begun = self._begun[step.name, matrix] = _Begun(self._matrix(columns, rows, bits), rows)
        transpose(block, begun.lying[:, first : first + len(block)])
        with self._lock:
            begun.missing -= len(block)
            if begun.missing:
                return
            del self._begun[step.name, matrix]
        self._write(step.name, begun.lying.reshape(-1).view("u1").data, matrix * begun.lying.nbytes)
        with self._lock:
            self._done.append(begun.lying)

    def finish(self) -> None:
        """Check that every matrix that was begun has been written."""
        assert not self._begun, f"rows are missing in {sorted(self._begun)[:3]}"

    def _matrix(self, columns: int, rows: int, bits: np.dtype[Any]) -> NDArray[Any]:
        """A buffer for a matrix: a free one of the same size, or a new one."""
        while self._done:
            again = self._done.pop()
            if again.size == columns * rows and again.dtype == bits:
                return again.reshape(columns, rows)
        return np.empty((columns, rows), bits)
