"""Write rows of the output: merged numbers, rounded once to the dtype of their tensor, or the template's bytes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from polymerge.checkpoints import TensorInfo
from polymerge.checkpoints.writer import Write
from polymerge.dtypes import BITS, byte_count
from polymerge.engine.blocks import Workspace
from polymerge.engine.extents import Extent, Files, TransposedWriter, begins, clip, extents
from polymerge.engine.overflow import Overflow
from polymerge.engine.pool import Pool
from polymerge.families.expressions import Ranges
from polymerge.methods import kernels
from polymerge.planning import Piece, Step

__all__ = ["CopiedRows", "RoundedRows", "RoundedWriter"]

COPY_BLOCK: Final = 1 << 22


@dataclass(frozen=True)
class RoundedWriter:
    """What all tensors of a merge are written with.

    transposed  takes the rows of matrices that the output stores transposed
    overflow    counts what does not fit its dtype
    """

    workspace: Workspace
    write: Write
    transposed: TransposedWriter
    overflow: Overflow

    def rows(self, step: Step, piece: Piece) -> RoundedRows:
        """The rows of one piece."""
        return RoundedRows(self, step, piece)


class RoundedRows:
    """The rows of a piece, as one stretch of elements.

    width  bytes of an element in the output
    """

    def __init__(self, to: RoundedWriter, step: Step, piece: Piece) -> None:
        self._to, self._step, self._piece = to, step, piece
        self.width = BITS[step.dtype] // 8
        self._row_size = byte_count(step.dtype, step.row_shape)
        self._beginnings = begins(stop - start for start, stop in piece.rows)

    @property
    def workspace(self) -> Workspace:
        """Where its buffers are."""
        return self._to.workspace

    def put(self, start: int, result: Any) -> memoryview:
        """Round merged numbers [n] once and write them, from element `start` on; from any thread.

        returns their bytes, which are valid until this thread's next call
        """
        device = self.workspace.device
        raw = self.workspace.raw("write", result.shape[0] * self.width)
        encoded = device.beside(raw)
        finite = kernels.encode(result, self._step.dtype, encoded)
        device.download(encoded, raw)
        view = device.view(raw)
        if not finite:
            self._to.overflow.count(self._piece.canonical, self._step.name, self._step.dtype, view)
        self.write(start, view)
        return view

    def write(self, start: int, view: memoryview) -> None:
        """Write the bytes of elements, from element `start` on; from any thread."""
        rows, row_size, done = self._piece.rows, self._row_size, 0
        for first, last in _within(rows, self._beginnings, row_size, start * self.width, len(view)):
            part = view[done : done + last - first]
            if self._step.transposed:
                self._to.transposed.put(self._step, first // row_size, part)
            else:
                self._to.write(self._step.name, part, first)
            done += last - first


class CopiedRows:
    """Copies what the template has unchanged, by blocks that go through the pool.

    entries  the location of the template's tensors
    """

    def __init__(self, to: RoundedWriter, entries: Mapping[str, TensorInfo], files: Files, pool: Pool) -> None:
        self._to, self._entries, self._files, self._pool = to, entries, files, pool

    def all(self, step: Step) -> None:
        """Queue the copying of a whole tensor."""
        self._copy(step, 0, self._entries[step.name].nbytes)

    def rows(self, step: Step, rows: Ranges) -> None:
        """Queue the copying of rows."""
        width = byte_count(step.dtype, step.row_shape)
        for start, stop in rows:
            if not step.transposed:
                self._copy(step, start * width, stop * width)
                continue
            for run in extents(step.rows(((start, stop),)), self._entries):
                self._pool.submit(run.count // step.shape[1] * width, self._copy_transposed, step, start, run)
                start += run.count // step.shape[1]

    def moved(self, step: Step, piece: Piece, block: int) -> None:
        """Queue the copying of what the template has in other tensors, `block` elements at a time."""
        rows, runs = self._to.rows(step, piece), extents(piece.reads[0], self._entries)
        beginnings, total = begins(run.count for run in runs), sum(run.count for run in runs)

        def move_block(start: int, stop: int) -> None:
            view, done = self._view((stop - start) * rows.width), 0
            for run in clip(runs, start, stop, beginnings):
                self._files.fill(run, view[done : done + run.count * rows.width])
                done += run.count * rows.width
            rows.write(start, view)

        for start in range(0, total, block):
            stop = min(start + block, total)
            self._pool.submit((stop - start) * rows.width, move_block, start, stop)

    def _copy_transposed(self, step: Step, row: int, run: Extent) -> None:
        """Copy rows of one matrix, starting at row `row` of the tensor."""
        view = self._view(byte_count(run.dtype, (run.count,)))
        self._files.fill(run, view)
        self._to.transposed.put(step, row, view)

    def _copy(self, step: Step, first: int, last: int) -> None:
        """Queue the copying of bytes `first` to `last` of a tensor."""
        entry = self._entries[step.name]

        def copy_block(start: int, stop: int) -> None:
            view = self._view(stop - start)
            self._files.read(entry.file, entry.start + start, view)
            self._to.write(step.name, view, start)

        for start in range(first, last, COPY_BLOCK):
            stop = min(start + COPY_BLOCK, last)
            self._pool.submit(stop - start, copy_block, start, stop)

    def _view(self, size: int) -> memoryview:
        workspace = self._to.workspace
        return workspace.device.view(workspace.raw("read", size))


def _within(rows: Ranges, beginnings: Sequence[int], row_size: int, start: int, size: int) -> Iterator[tuple[int, int]]:
    """Map `size` bytes from byte `start` of stacked rows to their positions in the tensor."""
    for place in range(bisect_right(beginnings, start // row_size) - 1, len(rows)):
        (first, last), position = rows[place], beginnings[place] * row_size
        if position >= start + size:
            return
        begin, end = max(start, position), min(start + size, position + (last - first) * row_size)
        if begin < end:
            yield first * row_size + begin - position, first * row_size + end - position
