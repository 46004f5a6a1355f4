"""Carry out a plan's steps: blocks go through a thread pool, and each is written as soon as it is computed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from math import ceil, prod
from pathlib import Path
from typing import Any, TypeVar

from polymerge.checkpoints import TensorInfo
from polymerge.checkpoints.writer import Write
from polymerge.engine.blocks import Block, PieceBlocks, Workspace, repeats
from polymerge.engine.device import Device
from polymerge.engine.extents import Files, TransposedWriter
from polymerge.engine.finished import Finished
from polymerge.engine.lora_modules import ModuleMerger
from polymerge.engine.matrix_merger import KeptDeltas, MatrixMerger, files_of
from polymerge.engine.norms import ModuleNorms
from polymerge.engine.overflow import Overflow, keeps_bytes
from polymerge.engine.pool import Pool, Tally
from polymerge.engine.rounded_rows import CopiedRows, RoundedWriter
from polymerge.engine.statistics import STATISTICS, Deltas, draw_keys, gram
from polymerge.engine.whole_models import WholeModels, Wholes, measured_with
from polymerge.methods import kernels
from polymerge.methods.decompositions import one_thread
from polymerge.methods.kernels import CELL
from polymerge.methods.method import READS, method_function
from polymerge.planning import Piece, Plan, Step
from polymerge.planning.estimate import BLOCK, TURNED
from polymerge.planning.matrix_costs import free_memory, matrices_of, room_for_matrices
from polymerge.recipe.parameters import Setting

__all__ = ["Execution", "execute"]

T = TypeVar("T")


def execute(
    plan: Plan,
    entries: Sequence[Mapping[str, TensorInfo]],
    write: Write,
    *,
    device: Device,
    threads: int,
    block: int = BLOCK,
    tally: Tally | None = None,
) -> list[ModuleNorms]:
    """Compute or copy every tensor of a plan, and write its bytes.

    entries  for each of the plan's inputs, the location of its tensors
    write    receives the bytes: files of a new folder, or a model in memory
    block    elements merged at a time; neither it nor `threads` affects the result
    tally    counts the output's bytes, and the matrices that are merged
    returns  the measured norms of each module merged by its factors

    raises CheckpointError if an input has NaN or infinite values, or its file cannot be read, or if merged numbers
    are too large for their dtype.
    """
    with Execution(entries, device=device, threads=threads, block=block) as execution:
        return execution.run(plan, write, tally)


class Execution:
    """Carries out several plans over the same inputs; statistics of the inputs are computed once and kept.

    entries, device, threads, block   as in `execute`
    again    whether more plans will follow, so that caching tensor locations pays off
    memory   the content of input files that exist only in memory
    finished matrices that an earlier run of the plan has written
    """

    def __init__(
        self,
        entries: Sequence[Mapping[str, TensorInfo]],
        *,
        device: Device,
        threads: int,
        block: int = BLOCK,
        again: bool = False,
        memory: Mapping[Path, memoryview] | None = None,
        finished: Finished | None = None,
    ) -> None:
        self.entries, self.device, self.block, self.again = entries, device, block, again
        self.pool, self.finished = Pool(threads), finished
        self.kept = KeptDeltas(free_memory() // 2 if again else 0)
        self.workspace = Workspace(device)
        self.files = Files(memory)
        # statistics of tensors, which do not depend on weights: a sweep of a coefficient needs them once
        self._known: dict[Hashable, Any] = {}

    def __enter__(self) -> Execution:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release threads and files; queued work that has not started is dropped."""
        self.pool.close()
        self.files.close()

    def run(self, plan: Plan, write: Write, tally: Tally | None = None) -> list[ModuleNorms]:
        """Compute or copy every tensor of a plan; see `execute`."""
        self.begin(plan, write, tally)
        norms = self.carry_out(plan.steps, self.whole_models.found())
        self.overflow.refuse()
        return norms

    def begin(self, plan: Plan, write: Write, tally: Tally | None = None) -> None:
        """Begin a plan, of which `carry_out` then writes steps."""
        self.tally = tally or Tally(0, None)
        self.pool.advance = self.tally.advance
        self.plan, self.write, self.transposed_out = plan, write, TransposedWriter(write)
        self.overflow = Overflow(plan)
        self.rounded = RoundedWriter(self.workspace, write, self.transposed_out, self.overflow)
        self.copied = CopiedRows(self.rounded, self.entries[plan.template], self.files, self.pool)
        # one threshold over a whole model needs one precision for all of it
        self.wide = {
            number
            for step, piece, setting in plan.merged_pieces()
            if is_wide(step) and setting.parameters.get("trim") == "model"
            for number in measured_with(plan, piece.setting or 0)
        }
        self.kept.begin()

    @property
    def whole_models(self) -> WholeModels:
        """What computes the statistics over whole models that the plan needs."""

        def of(step: Step, piece: Piece, in_cells: bool) -> PieceBlocks:
            return self._blocks(step, piece, self._cells if in_cells else None)

        return WholeModels(self.plan, of, self._repeats, self._once, self._of, self.pool.run_all)

    def carry_out(self, steps: Sequence[Step], wholes: Wholes) -> list[ModuleNorms]:
        """Compute or copy the tensors of some steps of the plan; what overflows is counted, and not refused."""
        self._wholes = wholes
        modules = ModuleMerger(self.plan, self.entries, self.files, self.write, self.overflow)
        # a module or matrix is computed on one thread, whose linear algebra has no threads of its own
        whole = any(step.lora for step in steps) or any(one.whole for one in self.plan.settings)
        self.pool.room = min(room_for_matrices(self.plan), self.device.free or sys.maxsize)
        with one_thread() if whole else nullcontext():
            for step in steps:
                if step.lora is not None:
                    self.pool.submit(step.size, modules.run, step, long=True)
                else:
                    self._run_step(step)
            self.pool.finish()
        self.transposed_out.finish()
        return modules.norms

    def _run_step(self, step: Step) -> None:
        if step.fate == "copied" and not step.pieces:
            self.copied.all(step)
        for piece in step.pieces:
            if piece.setting is not None:
                self._merge(step, piece, self.plan.settings[piece.setting])
            elif keeps_bytes(step, piece) and piece.reads:
                self.copied.moved(step, piece, self._size(step, piece))
            elif keeps_bytes(step, piece):
                self.copied.rows(step, piece.rows)
            else:
                self._convert(step, piece)

    def _blocks(self, step: Step, piece: Piece, block: int | None = None) -> PieceBlocks:
        size = block or self._size(step, piece)
        if not self.again:
            return self._laid_out(step, piece, size)
        key = ("blocks", piece.canonical, size, self._of(step, piece))
        return self._once(key, lambda: self._laid_out(step, piece, size))

    def _size(self, step: Step, piece: Piece) -> int:
        """Elements per block: more, in full rows, if rows are columns in an input or output file.

        A block reads everything between its first and last column of such a file.
        """
        rows, width = sum(stop - start for start, stop in piece.rows), prod(step.row_shape)
        if not step.turns(piece) or not rows * width:
            return self.block
        blocks = ceil(rows / max(TURNED * self.block // width, 1))
        return ceil(rows / blocks) * width

    def _laid_out(self, step: Step, piece: Piece, block: int) -> PieceBlocks:
        inputs = [
            *(piece.inputs or self.plan.models),
            *([self.plan.base] if piece.base is not None and self.plan.base is not None else []),
        ]
        labels = [self.plan.inputs[place].label for place in inputs]
        entries = [self.entries[place] for place in inputs]
        wide = is_wide(step) or piece.setting in self.wide
        return PieceBlocks(piece, labels, entries, self.files, self.workspace, block, wide)

    def _repeats(self, piece: Piece, twin: Piece) -> bool:
        key = ("repeats", piece, twin, self.plan.models, self.plan.base)
        return self._once(key, lambda: repeats(self.plan, piece, twin, self.entries, self.files))

    def _once(self, key: Hashable, find: Callable[[], T]) -> T:
        """The cached value for this key; computed and cached on first use."""
        if key not in self._known:
            self._known[key] = find()
        found: T = self._known[key]
        return found

    def _of(self, step: Step, piece: Piece) -> Hashable:
        """A key of everything that the values of a piece depend on."""
        wide = is_wide(step) or piece.setting in self.wide
        return piece.reads, piece.base, piece.inputs or self.plan.models, self.plan.base, wide

    @property
    def _cells(self) -> int:
        """Elements per block of full cells, over which sums are taken in a fixed order."""
        return max(self.block // CELL, 1) * CELL

    def _merge(self, step: Step, piece: Piece, setting: Setting) -> None:
        row, arguments = setting.row, setting.arguments
        if row.on == "matrices":
            self._merge_matrices(step, piece, setting, arguments)
            return
        width = prod(step.row_shape) if step.row_shape else sum(stop - start for start, stop in piece.rows)
        blocks = self._blocks(step, piece, max(self.block // max(width, 1), 1) * width if setting.by_row else None)
        if not blocks.count:
            return
        if setting.by_row:
            arguments["width"] = width
        if row.random:
            arguments["keys"] = tuple(draw_keys(self.plan.seed, self._places(piece), piece.twin or piece.canonical))
        if (known := self._wholes.cutoffs.get(piece.setting or 0)) is not None:
            arguments["cutoff"] = known
        elif row.statistic is not None and row.statistic in STATISTICS:
            found = STATISTICS[row.statistic]
            read = {name: arguments[name] for name in READS[row.statistic]}
            source = Deltas([self._blocks(step, piece, self._cells) if found.in_cells else blocks])
            arguments[row.statistic] = self._once(
                (row.statistic, *read.values(), self._of(step, piece)),
                lambda: found.compute(source, read, self.pool.run_all),
            )
        elif row.statistic == "gram" and not setting.by_row:
            known_gram = self._wholes.grams.get(piece.setting or 0)
            if known_gram is None:
                whole = self._blocks(step, piece, self._cells)
                known_gram = self._once(("gram", self._of(step, piece)), lambda: gram([whole], self.pool.run_all))
            arguments["gram"] = known_gram
        if setting.whole:
            self._merge_matrices(step, piece, setting, arguments)
            return
        function = method_function(row)
        scale = float(setting.parameters.get("scale", 1.0))

        def merged(block: Block) -> Any:
            more = {"start": block.start} if row.random else {}
            if row.sees_base:
                assert block.base is not None
                more["base"] = kernels.weighted_sum(block.base.reshape(1, -1), [1.0])
            result = function(block.models, **arguments, **more)
            return result if block.base is None else kernels.add_scaled(block.base, result, scale)

        self._write_blocks(step, piece, blocks, merged)

    def _merge_matrices(self, step: Step, piece: Piece, setting: Setting, given: Mapping[str, Any]) -> None:
        """Queue every matrix of a piece, each for one thread, as many at once as there is memory for.

        given  the arguments of the method's function beside the deltas
        """
        assert piece.base is not None
        assert self.plan.base is not None
        matrices, size = matrices_of(step, piece, setting), self._size(step, piece)
        blocks = self._laid_out(step, piece, size)
        origin = replace(piece, reads=(piece.base,), inputs=(self.plan.base,), base=None)
        base, rows = self._laid_out(step, origin, size), self.rounded.rows(step, piece)
        files = files_of(self.plan, piece, self.entries)
        known = self.finished, self.kept, self._of(step, piece)
        merger = MatrixMerger(step, piece, setting, given, matrices, blocks, base, rows, size, files, *known)
        cost, count = matrices.seconds / max(matrices.count, 1), self.tally.matrix

        def run(number: int) -> None:
            count(cost, kept=merger.run(number))

        for number in range(matrices.count):
            written = matrices.rows * matrices.columns * rows.width
            self.pool.submit_large(written, matrices.room, run, number)

    def _places(self, piece: Piece) -> Sequence[int]:
        """The indices in the recipe of the models that a piece is merged from."""
        place_of = dict(zip(self.plan.models, self.plan.places, strict=True))
        return [place_of[place] for place in piece.inputs] if piece.inputs else self.plan.places

    def _convert(self, step: Step, piece: Piece) -> None:
        """Write rows of one input: the template's in another dtype, or with an adapter's update."""
        (place,) = piece.inputs or (self.plan.template,)
        reads = piece.reads or (step.rows(piece.rows),)
        whole = Piece(piece.canonical, piece.rows, reads=reads)
        labels, entries = [self.plan.inputs[place].label], [self.entries[place]]
        blocks = PieceBlocks(whole, labels, entries, self.files, self.workspace, self._size(step, piece), is_wide(step))
        self._write_blocks(step, piece, blocks, lambda block: kernels.weighted_sum(block.models, [1.0]))

    def _write_blocks(self, step: Step, piece: Piece, blocks: PieceBlocks, compute: Callable[[Block], Any]) -> None:
        """Queue every block of a piece: read, compute, round once, write."""
        rows = self.rounded.rows(step, piece)

        def write_block(index: int) -> None:
            block = blocks.read(index)
            rows.put(block.start, compute(block))

        for index, size in enumerate(blocks.sizes):
            self.pool.submit(size * rows.width, write_block, index)


def is_wide(step: Step) -> bool:
    """Return whether a tensor is computed in float64: if the template or the output stores it in float64."""
    return "F64" in (step.dtype, step.source_dtype)
