"""Merge adapter modules by their factors: in the requested space, truncated to the planned rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polymerge.checkpoints import TensorInfo
from polymerge.checkpoints.writer import Write
from polymerge.dtypes import byte_count
from polymerge.engine.cutoffs import Source
from polymerge.engine.extents import Files
from polymerge.engine.norms import ModuleNorms, module_norms, together
from polymerge.engine.overflow import Overflow
from polymerge.engine.statistics import STATISTICS, draw_keys
from polymerge.errors import CheckpointError
from polymerge.families.expressions import LowRank
from polymerge.methods import kernels
from polymerge.methods.calibration import svc
from polymerge.methods.lora import Factors, cores_of, enter, of_dense, pad, stack, truncate
from polymerge.methods.method import method_function
from polymerge.methods.weights import shares
from polymerge.planning import Plan, Step
from polymerge.planning.plan import PREFIX
from polymerge.recipe.parameters import Setting

__all__ = ["ModuleMerger", "factors_of"]

Floats = Any

ROWS = 1 << 19
"""Elements of an update computed at a time, for methods that need the full update."""

Keys = Callable[[str], Sequence[int]]
"""Returns each model's key for random draws on the tensor of this name."""


class ModuleMerger:
    """Merges or copies the modules of a plan, each on a single thread, so that results do not depend on the thread
    count.

    entries   for each of the plan's inputs, the location of its tensors
    overflow  counts what does not fit its dtype
    """

    def __init__(
        self,
        plan: Plan,
        entries: Sequence[Mapping[str, TensorInfo]],
        files: Files,
        write: Write,
        overflow: Overflow,
    ) -> None:
        self._plan, self._entries, self._files, self._write, self._overflow = plan, entries, files, write, overflow
        self._norms: dict[str, ModuleNorms] = {}

    @property
    def norms(self) -> list[ModuleNorms]:
        """The norms of each merged module, in the plan's order."""
        return [self._norms[step.name] for step in self._plan.steps if step.name in self._norms]

    def run(self, step: Step) -> None:
        """Write the factors of one module; raises CheckpointError if values of the adapters are NaN or infinite."""
        (piece,) = step.pieces
        reads = [
            (place, read) for place, read in zip(piece.inputs, piece.reads, strict=True) if isinstance(read, LowRank)
        ]
        if piece.setting is None:
            ((place, read),) = reads
            if read.swapped:
                self._put(step, *_whole(factors_of(read, self._load(place, read.b)[1], self._load(place, read.a)[1])))
                return
            for stored, name in zip(step.stored, (read.a, read.b, read.bias), strict=False):
                raw, _ = self._load(place, str(name))
                self._write(stored, memoryview(raw), 0)
            return
        assert step.lora is not None
        setting = self._plan.settings[piece.setting]
        # a product of this step's factors is multiplied by the output's scaling once it is loaded
        ratios = [read.scale / step.lora.scaling for _, read in reads]
        factors = [
            factors_of(read, self._load(place, read.b)[1] * np.float32(ratio), self._load(place, read.a)[1])
            for (place, read), ratio in zip(reads, ratios, strict=True)
        ]
        labels = [self._plan.inputs[place].label for place in piece.inputs]
        results, norms = list[Factors](), list[ModuleNorms]()
        for expert, pairs in enumerate(zip(*factors, strict=True)):
            own = str(expert) if step.lora.experts else ""

            def keys(name: str, own: str = own) -> list[int]:
                which = ".".join(filter(None, (own, name)))
                return draw_keys(self._plan.seed, piece.inputs, f"{step.canonical}{which and f'#{which}'}")

            merged, lost = merge_pairs(setting, pairs, step.lora.rank, keys)
            results.append(merged)
            norms.append(module_norms(step.name, piece.setting, labels, pairs, merged, step.lora.scaling, lost))
        self._norms[step.name] = together(norms)
        values = _whole(results)
        if step.lora.bias:
            weights = model_weights(setting, len(reads))
            scale = 1.0 if setting.row.scales else float(setting.parameters.get("scale", 1.0))
            values.append(
                sum(
                    self._load(place, read.bias)[1] * np.float32(weight * ratio * scale)
                    for (place, read), ratio, weight in zip(reads, ratios, weights, strict=True)
                    if read.bias
                )
            )
        self._put(step, *values)

    def _put(self, step: Step, *values: Floats) -> None:
        """Round and write the factors of one module."""
        for (name, (dtype, shape)), array in zip(step.stored.items(), values, strict=True):
            if array.shape != shape:
                end = name.removeprefix(f"{PREFIX}{step.name}.")
                raise CheckpointError(f"{step.name}: the merged {end} is {list(array.shape)}, planned is {list(shape)}")
            out: Floats = np.empty(byte_count(dtype, shape), np.uint8)
            if not kernels.encode(np.ascontiguousarray(array).reshape(-1), dtype, out):
                self._overflow.count(step.canonical, name, dtype, out)
            self._write(name, memoryview(out), 0)

    def _load(self, place: int, name: str) -> tuple[Floats, Floats]:
        """Load a tensor of an input: its bytes, and its values in float32."""
        entry = self._entries[place][name]
        raw, values, finite = self._files.numbers(entry)
        if not finite:
            raise CheckpointError(
                f"{entry.file}: {entry.name} of '{self._plan.inputs[place].label}' holds NaN or infinity. A merge "
                "would spread it: repair the adapter, or name it in exclude"
            )
        return raw, values


def factors_of(read: LowRank, b: Floats, a: Floats) -> list[Factors]:
    """The updates that two loaded factors hold: one, or one for each expert."""
    if not read.experts:
        return [Factors(b, a)]
    each = [kernels.of_expert(a, b, expert, read.experts) for expert in range(read.experts)]
    return [Factors(kernels.transposed(a), kernels.transposed(b)) if read.swapped else Factors(b, a) for a, b in each]


def _whole(experts: Sequence[Factors]) -> list[Floats]:
    """The factors a and b of all experts, as they are stored together; those of one update as they are."""
    b = np.stack([one.b for one in experts], axis=-1).reshape(len(experts[0].b), -1)
    return [np.concatenate([one.a for one in experts]), b]


def merge_pairs(setting: Setting, pairs: Sequence[Factors], rank: int, keys: Keys) -> tuple[Factors, float]:
    """Merge updates given by their factors into one of rank `rank`.

    pairs    in the models' order, with scalings included
    keys     for methods that draw random numbers
    returns  the merged factors, and the norm lost by truncation to `rank`, relative to the full update's norm
    """
    row, given = setting.row, setting.arguments
    scale = float(setting.parameters.get("scale", 1.0))
    if setting.calibration is not None:
        plain = Setting(setting.method, {**setting.parameters, "calibrate": None, "scale": 1.0}, setting.on_base)
        merged, lost = merge_pairs(plain, pairs, rank, keys)
        cores = cores_of([merged, *pairs])
        calibrated = svc(cores.deltas[0], cores.deltas[1:], setting.calibration)
        return _cut(_scaled(cores.leave(calibrated), scale), rank)[0], lost
    if row.on == "matrices" and not row.of_factors:
        cores = cores_of(pairs)
        more = {"ranks": [pair.rank for pair in pairs]} if row.takes_ranks else {}
        return _cut(_scaled(cores.leave(method_function(row)(cores.deltas, **given, **more)), scale), rank)
    function = method_function(row, of_factors=bool(row.of_factors))
    if row.scales:
        given["scale"], scale = scale, 1.0
    if row.on == "factors" or row.of_factors:
        merged = function(pairs, **given, **({"rank": rank} if row.needs_rank else {}))
        return _cut(_scaled(merged, scale), rank)

    def beside(name: str, width: int, source: Source) -> dict[str, Any]:
        """What the function is given beside its block, for all blocks of a tensor."""
        more: dict[str, Any] = {"keys": keys(name)} if row.random else {}
        more |= {"width": width} if setting.by_row else {}
        if row.statistic is not None:
            compute = STATISTICS[row.statistic].compute
            more[row.statistic] = compute(source, given | more, lambda look, indices: map(look, indices))
        return more

    space = setting.parameters["space"]
    if space != "delta":
        inside = enter(space, pairs)
        joined = []
        for place, stacked in enumerate(inside.coordinates):
            rows = stacked.reshape(len(pairs), -1)
            more = beside(str(place), stacked.shape[-1], _Whole(rows))
            joined.append(function(rows.copy(), **given, **more) * np.float32(scale))
        merged = inside.leave([one.reshape(of.shape[1:]) for one, of in zip(joined, inside.coordinates, strict=True)])
        return _cut(merged, rank)
    if row.additive:
        return _cut(_scaled(stack(pairs, model_weights(setting, len(pairs))), scale), rank)
    updates = _Updates(pairs)
    dense = np.empty((len(pairs[0].b), pairs[0].a.shape[1]), np.float32)
    given |= beside("", dense.shape[1], updates)
    for index, start in enumerate(range(0, len(dense), updates.rows)):
        at = {"start": start * dense.shape[1]} if row.random else {}
        block = function(updates.read(index), **given, **at).reshape(-1, dense.shape[1])
        np.multiply(block, np.float32(scale), out=dense[start : start + updates.rows])
    return of_dense(dense, rank)


def model_weights(setting: Setting, models: int) -> list[float]:
    """Each model's coefficient in a plain sum: its weight, or equal shares for methods without weights."""
    weight = setting.parameters.get("weight")
    if weight is None:
        return [1 / models] * models
    return shares(weight, models, setting.parameters.get("normalize") in (True, "weight", "count"))


def _cut(factors: Factors, rank: int) -> tuple[Factors, float]:
    """Truncate factors to exactly this rank, or pad them with zeros."""
    cut, error = truncate(factors, rank)
    return pad(cut, rank), error


def _scaled(factors: Factors, scale: float) -> Factors:
    return factors if scale == 1 else factors._replace(b=factors.b * np.float32(scale))


class _Whole:
    """Coordinates [model, n] as a source of a single block."""

    def __init__(self, rows: NDArray[Any]) -> None:
        self._rows = rows
        self.sizes: Sequence[int] = [rows.shape[1]]

    def read(self, _: int) -> NDArray[Any]:
        """A copy of all of them, which may be overwritten."""
        return self._rows.copy()


class _Updates:
    """Full updates, some rows of all models at a time, as a source of blocks in which cutoffs are found."""

    def __init__(self, pairs: Sequence[Factors]) -> None:
        self._pairs = pairs
        out, width = len(pairs[0].b), pairs[0].a.shape[1]
        self.rows = max(ROWS // width, 1)
        self.count = out * width
        self.sizes: Sequence[int] = [min(self.rows, out - start) * width for start in range(0, out, self.rows)]

    def read(self, index: int) -> NDArray[np.float32]:
        """Compute the rows of the updates in a block, [model, n]."""
        start = index * self.rows
        blocks: Iterable[NDArray[np.float32]] = (pair.b[start : start + self.rows] @ pair.a for pair in self._pairs)
        return np.stack([block.reshape(-1) for block in blocks])
