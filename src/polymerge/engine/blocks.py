"""Read a piece of every model block by block, as rows of one array: the input of methods and statistics.

An adapter's update is computed as the elements are read, and never stored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from polymerge.checkpoints import TensorInfo
from polymerge.dtypes import BITS
from polymerge.engine.device import Device
from polymerge.engine.extents import Extent, Files, Scales, begins, clip, extents, same_numbers, shape_in
from polymerge.errors import CheckpointError
from polymerge.families.expressions import Adapted, Concat, Expr, Mean, Rows
from polymerge.methods import kernels
from polymerge.planning import Piece, Plan

__all__ = ["Block", "PieceBlocks", "Updates", "Workspace", "repeats"]

Array = Any  # numpy.ndarray on the CPU, torch.Tensor on another device
Load = Callable[[TensorInfo], Array]
"""Reads an entire tensor, [rows, columns], in the working dtype."""


class Workspace(threading.local):
    """Per-thread buffers, as large as the largest block so far."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._values: dict[str, Array] = {}
        self._raw: dict[str, Array] = {}

    def values(self, rows: int, count: int, precision: str) -> Array:
        """A [rows, count] array of float32 or float64, uninitialised."""
        have = self._values.get(precision)
        if have is None or have.shape[0] < rows or have.shape[1] < count:
            old = (0, 0) if have is None else have.shape
            have = self._values[precision] = self.device.empty((max(rows, old[0]), max(count, old[1])), precision)
        return have[:rows, :count]

    def raw(self, use: str, size: int) -> Array:
        """A host buffer of `size` bytes that files are read into or written from."""
        have = self._raw.get(use)
        if have is None or have.shape[0] < size:
            have = self._raw[use] = self.device.host_bytes(size)
        return have[:size]


class Block:
    """One block, starting at element `start`: `models` [model, n] are weights, or deltas if there is a `base` [n].

    Weights and the base may be raw BF16 bits; deltas never are.
    """

    def __init__(self, models: Array, base: Array | None, start: int) -> None:
        self.models, self.base, self.start = models, base, start


class PieceBlocks:
    """The blocks of one piece of a step.

    sizes   elements of each block, in order
    """

    def __init__(
        self,
        piece: Piece,
        labels: Sequence[str],
        entries: Sequence[Mapping[str, TensorInfo]],
        files: Files,
        workspace: Workspace,
        block: int,
        wide: bool,
    ) -> None:
        reads = [*piece.reads, *([piece.base] if piece.base is not None else [])]
        self._runs = [extents(expr, held) for expr, held in zip(reads, entries, strict=False)]
        self._updates = [
            Updates(expr, held, self._load, self._kept) for expr, held in zip(reads, entries, strict=False)
        ]
        self._beginnings = [begins(run.count for run in runs) for runs in self._runs]
        self._labels, self.files, self._workspace, self._block = labels, files, workspace, block
        self._has_base, self._merged = piece.base is not None, piece.setting is not None
        self.name = piece.canonical
        self.precision = "F64" if wide else "F32"
        # rows of BF16 are handed on as they lie on disk: compiled kernels widen them while they read
        bits = {"mean" if run.others else run.dtype for runs in self._runs for run in runs} == {"BF16"}
        self._as_bits = bits and not wide and workspace.device.takes_bits and not any(self._updates)
        self.count = sum(run.count for run in self._runs[0])
        self.sizes = [min(block, self.count - start) for start in range(0, self.count, block)]
        self._scales: dict[tuple[Path, int], Array] = {}

    def read(self, index: int) -> Block:
        """Read a block; its arrays are valid until this thread reads the next one.

        raises CheckpointError if a value is not finite.
        """
        return self.read_at(index * self._block, self.sizes[index])

    def read_at(self, start: int, count: int) -> Block:
        """Read `count` elements from `start` on; otherwise as `read`."""
        if self._as_bits:
            return self._read_bits(start, count)
        rows = self._workspace.values(len(self._runs), count, self.precision)
        for place, runs in enumerate(self._runs):
            self._fill(rows[place], runs, start, count, place)
            self._updates[place].add(rows[place], start)
        if not self._has_base:
            return Block(rows, None, start)
        base = rows[-1]
        return Block(kernels.subtract(rows[:-1], base), base, start)

    def empty(self, rows: int, count: int) -> Array:
        """An uninitialised array [rows, count] of the precision of blocks, on their device."""
        return self._workspace.device.empty((rows, count), self.precision)

    def numbers(self, values: Array) -> Array:
        """An array with these values in the precision of blocks, on their device."""
        return self._workspace.device.numbers(values, self.precision)

    def _read_bits(self, start: int, count: int) -> Block:
        """Read a block of BF16 numbers as raw bits."""
        size = 2 * count
        raw = self._workspace.raw("rows", size * len(self._runs)).reshape(len(self._runs), size)
        rows = raw.view("u2")
        for place, runs in enumerate(self._runs):
            done = 0
            for run in clip(runs, start, start + count, self._beginnings[place]):
                self.files.fill(run, raw[place, done : done + 2 * run.count].data)
                done += 2 * run.count
        if not kernels.finite(rows.reshape(-1)):
            raise self._bits_not_finite(rows, start, count)
        if not self._has_base:
            return Block(rows, None, start)
        deltas = self._workspace.values(len(rows) - 1, count, self.precision)
        return Block(kernels.subtract(rows[:-1], rows[-1], deltas), rows[-1], start)

    def _bits_not_finite(self, rows: Array, start: int, count: int) -> CheckpointError:
        place = [kernels.finite(row) for row in rows].index(False)
        done = 0
        for run in clip(self._runs[place], start, start + count, self._beginnings[place]):
            if not kernels.finite(rows[place, done : done + run.count]):
                break
            done += run.count
        return self._not_finite(run.file, place, start, count)

    def _not_finite(self, file: Path, place: int, start: int, count: int) -> CheckpointError:
        then = "A merge would spread it: repair the checkpoint, or name the entire tensor in exclude"
        return CheckpointError(
            f"{file}: {self.name} of '{self._labels[place]}' holds NaN or infinity (among elements {start} to "
            f"{start + count}). {then if self._merged else 'Repair the checkpoint'}"
        )

    def _load(self, entry: TensorInfo, precision: str = "", whose: str = "adapter") -> Array:
        """Load an entire tensor, which is small: a factor of an adapter, or scales."""
        count = prod(entry.shape)
        out = self._workspace.device.empty((count,), precision or self.precision)
        raw = self._workspace.device.host_bytes(entry.nbytes)
        self.files.read(entry.file, entry.start, self._workspace.device.view(raw))
        if not kernels.decode(self._workspace.device.upload(raw), entry.dtype, out):
            raise CheckpointError(f"{entry.file}: {entry.name} holds NaN or infinity. Repair the {whose}")
        return out.reshape(entry.shape)

    def _kept(self, entry: TensorInfo) -> Array:
        """Load a factor that holds those of all experts, or have it from the expert before."""
        return self.files.kept((entry.file, entry.start, self.precision), lambda: self._load(entry))

    def _scale(self, out: Array, scales: Scales) -> bool:
        """Multiply float32 elements by their scales, which are kept; return whether all of them are finite."""
        key = scales.stored.file, scales.stored.start
        if key not in self._scales:  # two threads may both load them, and get the same
            self._scales[key] = self._load(scales.stored, "F32", "checkpoint").reshape(scales.shape)
        grid = self._scales[key][scales.matrix]
        return kernels.times_scales(
            out, grid.T if scales.transposed else grid, scales.block, scales.width, scales.skipped
        )

    def _fill(self, out: Array, runs: tuple[Extent, ...], start: int, count: int, place: int) -> None:
        done = 0
        for run in clip(runs, start, start + count, self._beginnings[place]):
            target = out[done : done + run.count]
            self._decode(target, run, place, start, count)
            for other in run.others:
                more = self._workspace.device.empty((run.count,), self.precision)
                self._decode(more, other, place, start, count)
                target += more
            if run.others:
                target /= 1 + len(run.others)
            done += run.count

    def _decode(self, target: Array, run: Extent, place: int, start: int, count: int) -> None:
        raw = self._workspace.raw("read", run.count * BITS[run.dtype] // 8)
        self.files.fill(run, self._workspace.device.view(raw))
        widen = run.scales is not None and self.precision == "F64"  # the product is one of float32 all the same
        numbers = self._workspace.values(1, run.count, "F32")[0] if widen else target
        finite = kernels.decode(self._workspace.device.upload(raw), run.dtype, numbers)
        if not finite or (run.scales is not None and not self._scale(numbers, run.scales)):
            raise self._not_finite(run.file, place, start, count)
        if widen:
            target[:] = numbers


def repeats(plan: Plan, piece: Piece, twin: Piece, entries: Sequence[Mapping[str, TensorInfo]], files: Files) -> bool:
    """Return whether two merged pieces hold the same values, in the base and in every model.

    entries  for each of the plan's inputs, the location of its tensors
    """
    places = [*(piece.inputs or plan.models), *([] if plan.base is None else [plan.base])]
    ours, theirs = ([*one.reads, *([] if one.base is None else [one.base])] for one in (piece, twin))
    return len(ours) == len(theirs) and all(
        same_numbers(one, other, entries[place], files) for place, one, other in zip(places, ours, theirs, strict=False)
    )


@dataclass(frozen=True)
class Update:
    """The update that an adapter adds to elements `start` to `stop` of an expression: full rows of `width` elements.

    first   the row of the adapted tensor that contains element `start`
    expert  as in `Adapted`
    """

    start: int
    stop: int
    first: int
    width: int
    a: TensorInfo | None
    b: TensorInfo
    scale: float
    transposed: bool
    expert: tuple[int, int] | None


class Updates:
    """The adapters' updates to the elements of one expression; factors are read when first needed."""

    def __init__(self, expr: Expr, entries: Mapping[str, TensorInfo], load: Load, kept: Load | None = None) -> None:
        self._updates = tuple(_updates(expr, entries))
        self._load, self._kept, self._lock = load, kept or load, threading.Lock()
        self._factors: dict[int, tuple[Array, Array]] = {}

    def __bool__(self) -> bool:
        return bool(self._updates)

    def add(self, out: Array, start: int) -> None:
        """Add the adapters' updates to `out`, which holds the elements from `start` on."""
        stop = start + len(out)
        for number, update in enumerate(self._updates):
            begin, end = max(start, update.start), min(stop, update.stop)
            if begin < end:
                left, right = self._factors_of(number)
                first = update.first * update.width + begin - update.start
                kernels.add_low_rank(out[begin - start : end - start], left, right, update.scale, first)

    def _factors_of(self, number: int) -> tuple[Array, Array]:
        with self._lock:
            if number not in self._factors:
                update = self._updates[number]
                load = self._load if update.expert is None else self._kept
                b = load(update.b)
                if update.a is None:
                    column = b.reshape(-1, 1)
                    self._factors[number] = column, column[:1] * 0 + 1
                else:
                    a = load(update.a)
                    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)  # those of a convolution have more dimensions
                    if update.expert is not None:
                        a, b = kernels.of_expert(a, b, *update.expert)
                    flip = (kernels.transposed(a), kernels.transposed(b)) if update.transposed else (b, a)
                    self._factors[number] = flip
            return self._factors[number]


def _updates(expr: Expr, entries: Mapping[str, TensorInfo], shift: int = 0) -> Iterator[Update]:
    """The updates in an expression, in order of application; element positions are counted from `shift`."""
    match expr:
        case Adapted(of, a, b, scale, transposed, expert):
            yield from _updates(of, entries, shift)
            shape = shape_in(of, entries)
            there = entries[a] if a is not None else None
            width = prod(shape[1:] if expert is None else shape[-1:])
            yield Update(shift, shift + prod(shape), 0, width, there, entries[b], scale, transposed, expert)
        case Rows(of, start, stop):
            width = prod(shape_in(of, entries)[1:])
            low, high = shift + start * width, shift + stop * width
            for one in _updates(of, entries, shift):
                begin, end = max(one.start, low), min(one.stop, high)
                if begin < end:
                    first = one.first + (begin - one.start) // one.width
                    yield replace(one, start=begin - start * width, stop=end - start * width, first=first)
        case Concat(of):
            for block in of:
                yield from _updates(block, entries, shift)
                shift += prod(shape_in(block, entries))
        case Mean(of):
            for summand in of:
                for update in _updates(summand, entries, shift):
                    yield replace(update, scale=update.scale / len(of))
