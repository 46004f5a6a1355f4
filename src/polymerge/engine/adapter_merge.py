"""Carry out a plan of adapters: modules through a pool of threads, full weights like any other checkpoint's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from polymerge.checkpoints import Entry
from polymerge.checkpoints.adapter import Adapter, Pair, open_adapter
from polymerge.checkpoints.writer import Shards, Write, as_torch_file, copy_companions, lay_out
from polymerge.dtypes import byte_count
from polymerge.engine.adapter_modules import merge_pairs, model_weights
from polymerge.engine.device import Device
from polymerge.engine.executor import execute
from polymerge.engine.extents import Files
from polymerge.engine.norms import ModuleNorms, UpdateNorms, module_norms, update_norms
from polymerge.engine.statistics import draw_keys
from polymerge.errors import CheckpointError
from polymerge.methods import kernels
from polymerge.methods.factors import Factors
from polymerge.methods.table import METHODS
from polymerge.planning import AdapterPlan, PairRead, PairStep
from polymerge.planning.model import tensors_digest
from polymerge.planning.non_lora import PREFIX

__all__ = ["AdapterLayout", "reopen_adapters", "write_adapter", "zero_update"]

AdapterLayout = Literal["peft", "llava"]
Floats = Any


@dataclass(frozen=True)
class _Files:
    """The weight files of an output adapter: one in PEFT's layout, two in LLaVA's."""

    pairs: Shards
    extras: Shards | None


class _Made(NamedTuple):
    """What is said of a merged module: the share of its norm that its rank has no room for, and its norms."""

    error: float
    norms: ModuleNorms


def reopen_adapters(plan: AdapterPlan) -> list[Adapter]:
    """The adapters of a plan; raises CheckpointError where one is no longer what was planned with."""
    adapters = []
    for place in plan.models:
        recorded = plan.inputs[place]
        adapter = open_adapter(recorded.source, Path(recorded.path))
        if tensors_digest(adapter.entries) != recorded.headers:
            raise CheckpointError(f"{recorded.path}: its tensors have changed since it was planned. Plan again")
        adapters.append(adapter)
    return adapters


def write_adapter(
    plan: AdapterPlan,
    adapters: Sequence[Adapter],
    base: Mapping[str, Entry] | None,
    folder: Path,
    *,
    layout: AdapterLayout,
    as_torch: bool,
    threads: int,
    device: Device,
    block: int,
    advance: Callable[[int], None],
) -> tuple[dict[str, float], UpdateNorms]:
    """Compute the output's tensors and write them, its config and its companions to a folder.

    base     the tensors of the base, where full weights are merged as deltas to it
    returns  for each merged module the share of its norm that its rank has no room for; and how large all of it is
    """
    files = _lay_out(plan, layout)
    entries = [{entry.name: entry for entry in adapter.entries} for adapter in adapters]
    made: list[_Made] = []
    for shards, does in ((files.pairs, True), (files.extras, False)):
        if shards is None:
            continue
        with shards.create(folder) as write:
            if does:
                made = _Pairs(plan, entries, write).run(threads, advance)
            if plan.extras is not None and (files.extras is None or not does):
                inputs = [*entries, *([base] if base is not None else [])]
                execute(plan.extras, inputs, write, device=device, threads=threads, block=block, advance=advance)
    copy_companions(adapters[plan.template].folder, folder, deep=False)
    config = {**plan.config, "modules_to_save": _saved_modules(plan, adapters, layout)}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if as_torch or layout == "llava":
        for file in sorted(folder.glob("*.safetensors")):
            as_torch_file(file, file.with_suffix(".bin"))
    return {one.norms.module: one.error for one in made}, update_norms([one.norms for one in made], plan.settings)


def zero_update(label: str, adapter: Adapter) -> str | None:
    """What to say of an adapter whose update is all zeros, as one is that was not trained or not gathered; else None.

    Values are read until the first that is not zero.
    """
    files = Files()
    try:
        if not adapter.pairs or not all(_is_zero(pair, files) for pair in adapter.pairs.values()):
            return None
    finally:
        files.close()
    full = len(adapter.extras) + len(adapter.tokens)
    rest = f"only its {full} full weights come" if full else "nothing of it comes"
    return (
        f"'{label}': the update of its {len(adapter.pairs)} modules is all zeros, so that {rest} into the output. If "
        "it was trained, its lora_B were not saved as they were then"
    )


def _is_zero(pair: Pair, files: Files) -> bool:
    """Whether the product of a pair's factors is zero because one of them is, and so is its bias."""
    product = (pair.b, pair.a)
    bias = pair.bias
    return any(_all_zero(entry, files) for entry in product) and (bias is None or _all_zero(bias, files))


def _all_zero(entry: Entry, files: Files) -> bool:
    raw: Floats = np.empty(entry.nbytes, np.uint8)
    files.read(entry.file, entry.start, raw.data)
    values: Floats = np.empty(prod(entry.shape), np.float32)
    return kernels.decode(raw, entry.dtype, values) and not values.any()


def _saved_modules(plan: AdapterPlan, adapters: Sequence[Adapter], layout: AdapterLayout) -> list[str] | None:
    """Which modules PEFT has to replace by full weights; LLaVA's loader does that itself."""
    if layout == "llava":
        return None
    kept = {step.name for step in plan.extras.steps} if plan.extras else set()
    brought = [
        name
        for one in adapters
        for name, entry in one.extras.items()
        if entry.file in one.beside and f"{PREFIX}{name}" in kept
    ]
    modules = {*(plan.config.get("modules_to_save") or ()), *(name.rpartition(".")[0] for name in brought)}
    return sorted(modules) or None


def _lay_out(plan: AdapterPlan, layout: AdapterLayout) -> _Files:
    pairs = [
        (f"{PREFIX}{step.module}.{end}", dtype, shape)
        for step in plan.pairs
        for end, (dtype, shape) in step.tensors().items()
    ]
    extras = [(step.name, step.dtype, step.shape) for step in (plan.extras.steps if plan.extras else ())]
    whole = 1 << 62
    if layout == "llava":
        apart = lay_out(extras, whole, "non_lora_trainables") if extras else None
        return _Files(lay_out(pairs, whole, "adapter_model"), apart)
    return _Files(lay_out([*pairs, *extras], whole, "adapter_model"), None)


class _Pairs:
    """What the modules of one run share."""

    def __init__(self, plan: AdapterPlan, entries: Sequence[Mapping[str, Entry]], write: Write) -> None:
        self.plan, self.entries, self.write = plan, entries, write
        self.files = Files()

    def run(self, threads: int, advance: Callable[[int], None]) -> list[_Made]:
        """Merge every module; no bit depends on the number of threads, for each module is computed by one alone."""
        made: list[_Made] = []
        try:
            with threadpool_limits(1), ThreadPoolExecutor(threads, "polymerge") as pool:
                waiting = [(step, pool.submit(self._step, step)) for step in self.plan.pairs]
                try:
                    for step, future in waiting:
                        result = future.result()
                        if result is not None:
                            made.append(result)
                        advance(sum(byte_count(*tensor) for tensor in step.tensors().values()))
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
        finally:
            self.files.close()
        return made

    def _step(self, step: PairStep) -> _Made | None:
        ends = list(step.tensors())
        if step.fate == "copied":
            read = step.reads[0]
            for end, name in zip(ends, (read.a, read.b, read.bias), strict=False):
                raw = self._raw(read, name)
                self._decoded(read, name, raw)  # a look at its values
                self.write(f"{PREFIX}{step.module}.{end}", memoryview(raw), 0)
            return None
        assert step.setting is not None
        setting = self.plan.settings[step.setting]
        # a product of this step's factors is multiplied by the output's scaling once it is loaded
        ratios = [read.scaling / step.scaling for read in step.reads]
        pairs = [
            Factors(self._load(read, read.b) * np.float32(ratio), self._load(read, read.a))
            for read, ratio in zip(step.reads, ratios, strict=True)
        ]
        places = [read.input for read in step.reads]
        labels = [self.plan.inputs[place].label for place in places]

        def keys(name: str) -> list[int]:
            return draw_keys(self.plan.seed, places, f"{step.canonical}{name and f'#{name}'}")

        merged, error = merge_pairs(setting, pairs, step.rank, keys)
        norms = module_norms(step.module, step.setting, labels, pairs, merged, step.scaling)
        values: dict[str, Floats] = dict(zip(ends, (merged.a, merged.b), strict=False))
        if step.bias:
            weights = model_weights(setting, len(pairs))
            scale = 1.0 if METHODS[setting.method].scales else float(setting.parameters.get("scale", 1.0))
            values[ends[2]] = sum(
                self._load(read, read.bias) * np.float32(weight * ratio * scale)
                for read, ratio, weight in zip(step.reads, ratios, weights, strict=True)
                if read.bias
            )
        for end, array in values.items():
            dtype, shape = step.tensors()[end]
            if array.shape != shape or not np.isfinite(array).all():
                raise CheckpointError(
                    f"{step.module}: the merged {end} is {list(array.shape)} for {list(shape)}, or not finite: its "
                    "adapters hold numbers that are too large to be merged"
                )
            out: Floats = np.empty(byte_count(dtype, shape), np.uint8)
            kernels.encode(np.ascontiguousarray(array).reshape(-1), dtype, out)
            self.write(f"{PREFIX}{step.module}.{end}", memoryview(out), 0)
        return _Made(error, norms)

    def _load(self, read: PairRead, name: str) -> Floats:
        return self._decoded(read, name, self._raw(read, name))

    def _raw(self, read: PairRead, name: str) -> Floats:
        entry = self.entries[read.input][name]
        raw: Floats = np.empty(entry.nbytes, np.uint8)
        self.files.read(entry.file, entry.start, raw.data)
        return raw

    def _decoded(self, read: PairRead, name: str, raw: Floats) -> Floats:
        entry = self.entries[read.input][name]
        values: Floats = np.empty(prod(entry.shape), np.float32)
        if not kernels.decode(raw, entry.dtype, values):
            label = self.plan.inputs[read.input].label
            raise CheckpointError(
                f"{entry.file}: {entry.name} of '{label}' holds NaN or infinity. A merge would spread it: mend the "
                "adapter, or name it in exclude"
            )
        return values.reshape(entry.shape)
