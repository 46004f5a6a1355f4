"""The deltas that a plan merges, tensor by tensor, read on demand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, Protocol

import numpy as np

from polymerge.analysis.figures import Reference, Shape
from polymerge.analysis.signs import Whole
from polymerge.analysis.spectrum import Spectrum, spectrum_of, spectrum_of_factors
from polymerge.checkpoints import TensorInfo
from polymerge.engine.blocks import PieceBlocks, Workspace, repeats
from polymerge.engine.executor import is_wide
from polymerge.engine.extents import Files
from polymerge.engine.lora_modules import factors_of
from polymerge.errors import CheckpointError, RecipeError
from polymerge.families.expressions import LowRank
from polymerge.methods import kernels
from polymerge.methods.kernels import CELL
from polymerge.methods.lora import Factors, dot
from polymerge.planning import Piece, Plan, Step

__all__ = ["DeltaTensor", "stored_deltas", "stored_values", "update_deltas"]

Floats = Any


class DeltaTensor(Protocol):
    """The deltas of one tensor, for the models labelled `models`."""

    name: str
    reference: Reference
    models: tuple[str, ...]
    shape: Shape

    def blocks(self) -> Whole:
        """Their entries, block by block."""

    def dots(self) -> Floats | None:
        """Their dot products if they can be computed without reading entries, float64 [model, model]."""

    def room(self) -> int:
        """Maximum number of bytes that `spectrum` takes."""

    def spectrum(self, model: int, rank: int) -> Spectrum | None:
        """The spectrum of one delta; None for one that is zero."""


def stored_deltas(
    plan: Plan, entries: Sequence[Mapping[str, TensorInfo]], files: Files, workspace: Workspace, block: int
) -> Iterator[DeltaTensor]:
    """The deltas of stored tensors that a plan merges, each canonical one once.

    entries  for each of the plan's inputs, the location of its tensors
    block    entries read at a time, rounded down to a multiple of `CELL`
    """
    merged = {piece.canonical: (step, piece) for step, piece, _ in plan.merged_pieces() if step.lora is None}
    for step, piece in merged.values():
        if piece.twin in merged and repeats(plan, piece, merged[piece.twin][1], entries, files):
            continue  # one tensor of the model, stored twice
        found = _Stored(plan, step, piece, entries, files, workspace, max(block // CELL, 1) * CELL)
        if found.models and found.count:
            yield found


def update_deltas(plan: Plan, entries: Sequence[Mapping[str, TensorInfo]], block: int) -> Iterator[DeltaTensor]:
    """The updates stored as factors that a plan merges, module by module."""
    for step in plan.steps:
        if step.lora is not None and step.fate == "merged":
            for expert in range(step.lora.experts or 1):
                yield _Update(plan, step, entries, max(block // CELL, 1) * CELL, expert)


class _Stored:
    """Deltas of stored weights: from the base, or, if the method reads none, from the template."""

    def __init__(
        self,
        plan: Plan,
        step: Step,
        piece: Piece,
        entries: Sequence[Mapping[str, TensorInfo]],
        files: Files,
        workspace: Workspace,
        block: int,
    ) -> None:
        places = piece.inputs or plan.models
        self._files, self._workspace, self._block, self._wide = files, workspace, block, is_wide(step)
        self.name = piece.canonical
        self.reference: Reference = "base"
        self._rows = piece.rows
        rows = sum(stop - start for start, stop in piece.rows)
        self.shape: Shape = (rows, *step.row_shape) if step.shape else ()
        self.count = prod(self.shape)
        if piece.base is not None and plan.base is not None:
            origin, base = plan.base, piece.base
            others = list(zip(places, piece.reads, strict=True))
        else:
            # of an adapter's full weights the template may have none: then the first that has them stands for it
            self.reference = "template"
            origin = plan.template if plan.template in places else (*piece.inputs, plan.template)[0]
            own = [read for place, read in zip(places, piece.reads, strict=True) if place == origin]
            if not own and plan.inputs[origin].adapter:
                raise RecipeError(
                    f"{piece.canonical}: without a base, differences are taken from the template, and "
                    f"'{plan.inputs[origin].label}' stands with an adapter and is not among models. Name it there, or "
                    "say base_model and a method on deltas"
                )
            base = own[0] if own else step.rows(piece.rows)
            others = [(place, read) for place, read in zip(places, piece.reads, strict=True) if place != origin]
        self.models = tuple(plan.inputs[place].label for place, _ in others)
        self._labels = (*self.models, plan.inputs[origin].label)
        self._entries = [*(entries[place] for place, _ in others), entries[origin]]
        self._reads, self._base = tuple(read for _, read in others), base

    def _blocks(self, models: Sequence[int]) -> PieceBlocks:
        chosen = (*models, -1)
        piece = Piece(self.name, self._rows, reads=tuple(self._reads[place] for place in models), base=self._base)
        labels, entries = [self._labels[place] for place in chosen], [self._entries[place] for place in chosen]
        return PieceBlocks(piece, labels, entries, self._files, self._workspace, self._block, self._wide)

    def blocks(self) -> Whole:
        return _StoredBlocks(self._blocks(range(len(self.models))))

    def dots(self) -> Floats | None:
        return None

    def room(self) -> int:
        return 4 * self.count

    def spectrum(self, model: int, rank: int) -> Spectrum | None:
        blocks = _StoredBlocks(self._blocks([model]))
        matrix: Floats = np.empty(blocks.count, np.float32)
        done = 0
        for index, size in enumerate(blocks.sizes):
            with np.errstate(over="ignore"):
                matrix[done : done + size] = blocks.read(index)[0]
            done += size
        if not np.isfinite(matrix.max() - matrix.min()):
            raise _too_large(self.name)
        return spectrum_of(matrix.reshape(self.shape), rank)


class _StoredBlocks:
    """Only the deltas of a piece's blocks."""

    def __init__(self, blocks: PieceBlocks) -> None:
        self._blocks, self.count = blocks, blocks.count
        self.sizes: Sequence[int] = blocks.sizes

    def read(self, index: int) -> Floats:
        deltas = self._blocks.read(index).models
        if not np.isfinite(deltas).all():
            raise _too_large(self._blocks.name)
        return deltas


class _Update:
    """Adapters' updates of one module, or of one expert: low-rank products, with scalings included."""

    reference: Reference = "base"

    def __init__(
        self, plan: Plan, step: Step, entries: Sequence[Mapping[str, TensorInfo]], block: int, expert: int
    ) -> None:
        one = f"[{expert}]" if step.lora and step.lora.experts else ""
        self.name, self._block, self._expert = f"{step.canonical}{one}", block, expert
        out, width = step.shape
        self.shape: Shape = (out, width)
        (piece,) = step.pieces
        self.models = tuple(plan.inputs[place].label for place in piece.inputs)
        reads = zip(piece.inputs, piece.reads, strict=True)
        self._factored = [(entries[place], read) for place, read in reads if isinstance(read, LowRank)]

    def _factors(self, model: int) -> Factors:
        held, read = self._factored[model]
        b, a = stored_values(held[read.b]) * np.float32(read.scale), stored_values(held[read.a])
        return factors_of(read, b, a)[self._expert]

    def _pairs(self) -> list[Factors]:
        return [self._factors(model) for model in range(len(self.models))]

    def blocks(self) -> Whole:
        return _UpdateBlocks(self.name, self.shape, self._pairs(), self._block)

    def dots(self) -> Floats:
        pairs = self._pairs()
        return np.array([[dot(one, other) for other in pairs] for one in pairs])

    def room(self) -> int:
        return 0

    def spectrum(self, model: int, rank: int) -> Spectrum | None:
        return spectrum_of_factors(self._factors(model), rank)


class _UpdateBlocks:
    """Entries of updates, computed on demand."""

    def __init__(self, name: str, shape: Shape, pairs: Sequence[Factors], block: int) -> None:
        self._name, self._pairs, self._block, self.count = name, pairs, block, prod(shape)
        self.sizes: Sequence[int] = [min(block, self.count - start) for start in range(0, self.count, block)]

    def read(self, index: int) -> Floats:
        rows: Floats = np.zeros((len(self._pairs), self.sizes[index]), np.float32)
        for row, pair in zip(rows, self._pairs, strict=True):
            kernels.add_low_rank(row, pair.b, pair.a, 1.0, index * self._block)
        if not np.isfinite(rows).all():
            raise _too_large(self._name)
        return rows


def _too_large(name: str) -> CheckpointError:
    return CheckpointError(f"{name}: a delta is too large for its numbers. Repair the models, or name it in exclude")


def stored_values(tensor: TensorInfo) -> Any:
    """The values of a stored tensor as float32, in its shape; raises CheckpointError if impossible, or for NaN."""
    with Files() as files:
        _, values, finite = files.numbers(tensor)
    if not finite:
        raise CheckpointError(f"{tensor.file}: {tensor.name} holds NaN or infinity. Repair the adapter")
    return values
