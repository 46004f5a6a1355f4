"""Merge whole matrices: the deltas are read block by block, merged by one call, and written block by block."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from polymerge.checkpoints import TensorInfo
from polymerge.dtypes import byte_count
from polymerge.engine.blocks import PieceBlocks
from polymerge.engine.extents import begins, clip, extents
from polymerge.engine.finished import Finished, state_of
from polymerge.engine.rounded_rows import RoundedRows
from polymerge.errors import CheckpointError
from polymerge.families.expressions import names_read
from polymerge.methods import kernels
from polymerge.methods.calibration import svc
from polymerge.methods.method import method_function
from polymerge.planning import Piece, Plan, Step
from polymerge.planning.matrix_costs import Matrices
from polymerge.recipe.parameters import Setting

__all__ = ["KeptDeltas", "MatrixMerger", "files_of"]


class KeptDeltas:
    """Merged deltas of matrices, kept from one plan to the next: a search of a scale then decomposes each once.

    room  bytes that they may take
    """

    def __init__(self, room: int) -> None:
        self._room, self._lock = room, Lock()
        self._held: dict[Hashable, Any] = {}
        self._used: set[Hashable] = set()

    def begin(self) -> None:
        """Begin another plan: what the last one did not use is given up."""
        self._held = {key: self._held[key] for key in self._used if key in self._held}
        self._used = set()

    def of(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The merged delta of this key, kept or made; the caller may change it."""
        with self._lock:
            self._used.add(key)
            known = self._held.get(key)
        if known is not None:
            return known * 1  # a copy
        made = make()
        with self._lock:
            if sum(one.nbytes for one in self._held.values()) + made.nbytes <= self._room:
                self._held[key] = made * 1  # what is made may lie in the memory of all deltas
        return made


@dataclass(frozen=True)
class MatrixMerger:
    """Merges the matrices of one piece, each on one thread.

    given     the arguments of the method's function beside the deltas
    blocks    the models' elements, less the base's
    base      the base's elements, which are read again once the deltas are merged: so they take no memory until then
    rows      where merged elements are written
    size      elements to read and write at a time
    inputs    the files that the piece is read from
    finished  what an earlier run has written, and where to note what this one has
    kept      merged deltas of earlier plans
    source    what tells the values that the piece reads from others
    """

    step: Step
    piece: Piece
    setting: Setting
    given: Mapping[str, Any]
    matrices: Matrices
    blocks: PieceBlocks
    base: PieceBlocks
    rows: RoundedRows
    size: int
    inputs: Sequence[Path]
    finished: Finished | None
    kept: KeptDeltas
    source: Hashable

    def run(self, number: int) -> bool:
        """Merge matrix `number` of the piece, unless it is finished; returns whether it was.

        raises CheckpointError if an input is not finite, or the matrix cannot be decomposed.
        """
        if self.finished is None:
            self._merge(number)
            return False
        name, before = (self.step.name, self.piece.canonical, number), state_of(self.inputs)
        journal = self.finished.journal
        digest = journal.digest(name, before)
        if digest is not None and self._holds(number, digest):
            journal.take()
            return True
        digest = self._merge(number)
        if before and before == state_of(self.inputs):
            journal.note(name, digest, before)
        return False

    def _parts(self, number: int) -> Iterator[tuple[int, int]]:
        """The elements of a matrix, as parts of the piece that are read and written at a time."""
        count = self.matrices.rows * self.matrices.columns
        for first in range(number * count, (number + 1) * count, self.size):
            yield first, min(first + self.size, (number + 1) * count)

    def _merge(self, number: int) -> str:
        """Merge and write a matrix; returns the sha256 of its bytes."""
        start = number * self.matrices.rows * self.matrices.columns
        merged = self._kept(number) if self.setting.row.on == "matrices" else self._whole(number)
        scale = float(self.setting.parameters.get("scale", 1.0))
        digest = hashlib.sha256()
        for first, last in self._parts(number):
            (origin,) = self.base.read_at(first, last - first).models
            digest.update(self.rows.put(first, kernels.add_scaled(origin, merged[first - start : last - start], scale)))
        return digest.hexdigest()

    def _kept(self, number: int) -> Any:
        """What `_whole` returns, perhaps from an earlier plan, which may have had another scale."""
        said = tuple((name, value) for name, value in self.setting.parameters.items() if name != "scale")
        return self.kept.of((self.setting.method, said, self.source, number), lambda: self._whole(number))

    def _whole(self, number: int) -> Any:
        """Read and merge a matrix; returns the merged delta [m n]."""
        return self.blocks.numbers(self._merged(number)).reshape(-1)

    def _read(self, number: int, deltas: Any) -> Any:
        """Read the deltas of a matrix into `deltas` [model, m n]; returns them as [model, m, n], on the host if the
        method needs them there.
        """
        start = number * self.matrices.rows * self.matrices.columns
        for first, last in self._parts(number):
            deltas[:, first - start : last - start] = self.blocks.read_at(first, last - first).models
        shaped = deltas.reshape(self.matrices.models, self.matrices.rows, self.matrices.columns)
        return shaped if self.setting.row.takes_tensors else kernels.on_host(shaped)

    def _merged(self, number: int) -> Any:
        """The merged delta [m, n] of a matrix, calibrated if the recipe asks for it."""
        size = self.matrices.rows * self.matrices.columns
        deltas = self.blocks.empty(self.matrices.models, size)
        read = self._read(number, deltas)
        shape, row = tuple(read.shape[1:]), self.setting.row
        try:
            if row.on == "matrices":
                merged = method_function(row)(read, **self.given)
            else:
                more = {"start": number * size} if row.random else {}
                merged = method_function(row)(read.reshape(self.matrices.models, size), **self.given, **more)
                merged = merged.reshape(shape)
            if tuple(merged.shape) != shape:
                raise ValueError(f"{row.name}: its function returned {list(merged.shape)} for deltas of {list(shape)}")
            if self.setting.calibration is None:
                return merged
            merged = np.array(kernels.on_host(merged))  # it may lie in the memory of the deltas, which are read again
            return svc(merged, kernels.on_host(self._read(number, deltas)), self.setting.calibration)
        except (np.linalg.LinAlgError, RuntimeError) as error:  # torch's own is a RuntimeError
            if not type(error).__name__.endswith("LinAlgError"):
                raise
            raise CheckpointError(
                f"{self.blocks.name}: {row.name} cannot decompose this matrix: {error}. Name it in exclude, or give it "
                "another method"
            ) from error

    def _holds(self, number: int, digest: str) -> bool:
        """Return whether the output holds bytes of this sha256 as the matrix, and have them written where they are not
        written one by one.
        """
        found = hashlib.sha256()
        for first, last in self._parts(number):
            found.update(self._written(first, last))
        if found.hexdigest() != digest:
            return False
        if self.step.transposed:  # whose matrices are written once all of their rows are there
            for first, last in self._parts(number):
                self.rows.write(first, self._written(first, last))
        return True

    def _written(self, first: int, last: int) -> memoryview:
        """The bytes of elements of the piece as they are in the output; valid until this thread's next call."""
        runs, beginnings = self._runs
        workspace, done = self.rows.workspace, 0
        view = workspace.device.view(workspace.raw("write", (last - first) * self.rows.width))
        for run in clip(runs, first, last, beginnings):
            size = byte_count(run.dtype, (run.count,))
            self.blocks.files.fill(run, view[done : done + size])
            done += size
        return view

    @cached_property
    def _runs(self) -> tuple[Any, list[int]]:
        assert self.finished is not None
        runs = extents(self.step.rows(self.piece.rows), {self.step.name: self.finished.stored(self.step)})
        return runs, begins(run.count for run in runs)


def files_of(plan: Plan, piece: Piece, entries: Sequence[Mapping[str, TensorInfo]]) -> list[Path]:
    """The files that a merged piece is read from."""
    reads = [*zip(piece.inputs or plan.models, piece.reads, strict=True)]
    if piece.base is not None and plan.base is not None:
        reads.append((plan.base, piece.base))
    return list(dict.fromkeys(entries[place][name].file for place, expr in reads for name in names_read(expr)))
