"""Predictors of interference: how the deltas that a plan would merge relate to each other, before merging."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from math import inf
from typing import Any, Final, TypeVar

from polymerge.analysis.deltas import DeltaTensor, stored_deltas, update_deltas
from polymerge.analysis.figures import Measured, Overlap, Row, row_of, spectra_of
from polymerge.analysis.places import MODULES, Place, place_of
from polymerge.analysis.signs import sums_of
from polymerge.analysis.spectrum import EXACT, Spectrum
from polymerge.checkpoints import Checkpoint
from polymerge.engine.blocks import Workspace
from polymerge.engine.cutoffs import RunAll
from polymerge.engine.device import open_device
from polymerge.engine.extents import Files
from polymerge.engine.opening import entries_of, fetch, opened_inputs, refuse_changes, with_stamps
from polymerge.errors import RecipeError, collecting, refuse
from polymerge.families.rules import PARTS
from polymerge.methods.decompositions import one_thread
from polymerge.planning import Plan, make_plan
from polymerge.planning.estimate import BLOCK, default_threads
from polymerge.recipe.recipe import Recipe

__all__ = ["overlap"]

ROOM: Final = 1 << 28
"""Bytes of matrices that are decomposed concurrently; a larger one runs alone."""

T = TypeVar("T")


def overlap(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe | Plan,
    *,
    density: float = 0.2,
    rank: int = 8,
    svd: bool = True,
    threads: int | None = None,
    block: int = BLOCK,
    progress: Callable[[int, int], None] | None = None,
) -> Overlap:
    """Measure norms, cosines, sign conflicts, kept entries and singular directions of a plan's deltas.

    Weights of the recipe are ignored: every delta counts as it is. Sums are exact over cells of 65,536 entries, and
    BLAS uses one thread, so that no bit depends on threads or blocks. Memory is that of a few blocks, and, for singular
    values, of one matrix in float32 (of several if they are small).

    recipe   a file, mapping or `Recipe`; or a plan
    density  share of the entries of each tensor that is kept, by magnitude, in (0, 1]
    rank     number of singular directions compared per matrix, at least 1
    svd      whether to compute singular values, which takes most of the time
    threads  maximum number of threads; by default one per processor, up to 8
    block    entries read at a time
    progress called with tensors done and total tensors

    raises Refused with every problem of recipe and options, CheckpointError if an input's values cannot
    be compared (NaN, infinity), RecipeError if there is nothing to compare.
    """
    with collecting(needed=True):
        if not 0 < density <= 1:
            refuse(RecipeError(f"density: {density} is not above 0 and up to 1"))
        for name, value in (("rank", rank), ("block", block), ("threads", 1 if threads is None else threads)):
            if value < 1:
                refuse(RecipeError(f"{name}: {value} is not at least 1"))
        plan = make_plan(recipe)
    files = Files()
    workers = threads or default_threads()
    pool = ThreadPoolExecutor(workers, "polymerge")
    try:
        with one_thread():
            inputs = _inputs(plan)
            tensors = _deltas(plan, inputs, files, block)
            run_all = _run_all(pool, workers)
            measured = []
            for tensor in tensors:
                measured.append(_measure(tensor, density, rank if svd else None, run_all, workers))
                if progress is not None:
                    progress(len(measured), len(tensors))
            refuse_changes(inputs)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        files.close()
    if not measured:
        raise RecipeError("nothing to compare: the plan merges no tensor of two models, or of one with its base")
    return Overlap(
        plan.hash, density, rank if svd else None,
        tuple(row_of([one], one.place, one.name) for one in measured),
        tuple(_grouped(measured, lambda one: one.place)),
        tuple(_grouped(measured, lambda _: Place("all", None, "all"))),
        tuple(_notes(plan, measured)),
    )  # fmt: skip


def _inputs(plan: Plan) -> list[Checkpoint]:
    fetch(plan, merged_only=True)
    return [with_stamps(one) for one in opened_inputs(plan)]


def _deltas(plan: Plan, inputs: Sequence[Checkpoint], files: Files, block: int) -> list[DeltaTensor]:
    """Every tensor that the plan merges; nothing is read yet."""
    workspace = Workspace(open_device("cpu"))
    entries = entries_of(inputs)
    return [*update_deltas(plan, entries, block), *stored_deltas(plan, entries, files, workspace, block)]


def _run_all(pool: ThreadPoolExecutor, threads: int) -> RunAll:
    """Map a function over blocks in a pool: results come in order, and no more are in memory than the pool needs."""

    def run_all(function: Callable[[int], T], indices: Iterable[int]) -> Iterator[T]:
        waiting: deque[Future[T]] = deque()
        for index in indices:
            if len(waiting) >= 2 * threads:
                yield waiting.popleft().result()
            waiting.append(pool.submit(function, index))
        while waiting:
            yield waiting.popleft().result()

    return run_all


def _measure(tensor: DeltaTensor, density: float, rank: int | None, run_all: RunAll, threads: int) -> Measured:
    sums = sums_of(tensor.blocks(), density, run_all)
    dots = tensor.dots()
    if dots is not None:
        sums = replace(sums, dots=dots)
    spectra = None
    if rank is not None and len(tensor.shape) == 2:
        spectra = spectra_of(tensor.shape, _spectra(tensor, rank, run_all, threads))
    return Measured(
        tensor.name, place_of(tensor.name), tensor.reference, tensor.models, tensor.shape, sums, spectra
    )  # fmt: skip


def _spectra(tensor: DeltaTensor, rank: int, run_all: RunAll, threads: int) -> list[Spectrum | None]:
    """The spectrum of each delta, as many concurrently as memory allows."""
    beside = min(max(ROOM // max(tensor.room(), 1), 1), threads)
    models = range(len(tensor.models))
    found: list[Spectrum | None] = []
    for first in models[::beside]:
        found += run_all(lambda model: tensor.spectrum(model, rank), models[first : first + beside])
    return found


def _grouped(measured: Sequence[Measured], by: Callable[[Measured], Place]) -> Iterator[Row]:
    """One row per place; tensors with other models, or another reference, are kept separate."""
    groups: dict[tuple[Any, ...], list[Measured]] = {}
    for one in measured:
        groups.setdefault((by(one), one.reference, one.models), []).append(one)
    for key in sorted(groups, key=lambda key: _order(key[0])):
        yield row_of(groups[key], key[0])


def _order(place: Place) -> tuple[int, float, int]:
    parts = (*PARTS, "unknown", "all")
    layer = inf if place.layer is None else place.layer
    return parts.index(place.part), layer, (*MODULES, "all").index(place.module)


def _notes(plan: Plan, measured: Sequence[Measured]) -> Iterator[str]:
    alone = [one for one in measured if len(one.models) == 1]
    from_template = [one for one in measured if one.reference == "template"]
    if from_template:
        origin = "the first adapter" if plan.of_adapters else "the template"
        yield (
            f"{_tensors(from_template)} merged without a base: the deltas are differences from {origin} "
            f"('{plan.inputs[plan.template].label}'), not what each model has learned. Say base_model and a method on "
            "deltas, such as task_arithmetic, to compare that"
        )
    if alone:
        yield f"{_tensors(alone)} of one delta alone: there is nothing that it could conflict with"
    large = [one for one in measured if one.spectra and len(one.shape) == 2 and min(one.shape) > EXACT]
    if large and not plan.of_adapters:
        yield (
            f"the effective ranks of {len(large)} matrices whose shorter side is above {EXACT} are estimates, right to "
            "about five per cent"
        )
    deep = [one for one in measured if len(one.shape) > 2]
    if deep:
        yield f"{_tensors(deep)} of more than two dimensions, whose singular values are not looked at"
    if plan.of_adapters:
        single = [step for step in plan.steps if step.lora and step.fate == "copied"]
        if single:
            yield f"{len(single)} modules are copied from one adapter and not compared, such as {single[0].canonical}"


def _tensors(measured: Sequence[Measured]) -> str:
    return f"{len(measured)} tensors are" if len(measured) > 1 else f"{measured[0].name} is"
