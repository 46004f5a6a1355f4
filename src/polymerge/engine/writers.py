"""Write an output: a checkpoint, or an adapter for PEFT or LLaVA, with the files beside its weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, Protocol

from polymerge.checkpoints import Checkpoint, TensorInfo
from polymerge.checkpoints.adapter import Adapter
from polymerge.checkpoints.adapter_config import read_lora_config, saved_modules
from polymerge.checkpoints.beside import copy_files
from polymerge.checkpoints.bounds import CONFIG_BYTES, read_bounded
from polymerge.checkpoints.discovery import CONFIG
from polymerge.checkpoints.names import sort_names
from polymerge.checkpoints.pairs import paired, token_rows
from polymerge.checkpoints.tensor_info import Contents
from polymerge.checkpoints.writer import Shards, lay_out
from polymerge.dtypes import byte_count, dtype_name
from polymerge.engine.device import open_device
from polymerge.engine.executor import execute
from polymerge.errors import MissingExtraError, collecting
from polymerge.planning import Plan
from polymerge.planning.output_dtypes import Stored, output_config, stored_dtypes
from polymerge.planning.plan import PREFIX
from polymerge.planning.tokenizer_files import write_chosen

__all__ = ["Writer", "in_memory", "require", "writer_of"]


class Writer(Protocol):
    """One way to write an output.

    shards   the weight files, which the steps of the plan are written to first
    room     bytes that they need on the disk at once, converted or not
    """

    shards: Shards
    room: int

    def finish(self, folder: Path, beside: Mapping[str, Path]) -> dict[str, int]:
        """Write the files beside the weights, and convert these to torch files on request; return each weight file's
        size.

        beside  the files of the template that are taken over, by their paths in the output

        raises CheckpointError if one of them is gone.
        """

    def counted(self) -> dict[str, Any]:
        """The entry of polymerge.json on the tensors in these files."""


def writer_of(plan: Plan, inputs: Sequence[Checkpoint], shard_size: int, *, as_torch: bool) -> Writer:
    """The writer for a plan's layout; raises MissingExtraError if it needs a package that is not installed."""
    if as_torch:
        require("safetensors", "torch", to="write pytorch_model.bin files", instead="say `file_format='safetensors'`")
    if plan.layout == "checkpoint":
        return _CheckpointWriter(plan, inputs[plan.template], shard_size, as_torch)
    if plan.layout == "llava":
        require("safetensors", "torch", to="write LLaVA's .bin files", instead="say `layout='peft'`")
    return _AdapterWriter(plan, inputs, as_torch or plan.layout == "llava")


def require(*packages: str, to: str, instead: str) -> None:
    """Raise MissingExtraError if one of these packages is not installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingExtraError(
            f"{' and '.join(missing)} needed to {to}: pip install 'polymerge[transformers]', or {instead}"
        )


class _CheckpointWriter:
    """Writes sharded weights with an index, and the template's other files."""

    def __init__(self, plan: Plan, template: Checkpoint, shard_size: int, as_torch: bool) -> None:
        self._plan, self._template, self._as_torch = plan, template, as_torch
        self.shards = lay_out(_tensors(plan), shard_size)
        self.room = self.shards.room(as_torch)
        self._stored = stored_dtypes(plan.steps, template.config, plan.recipe.get("dtype") is not None)

    def finish(self, folder: Path, beside: Mapping[str, Path]) -> dict[str, int]:
        self.shards.write_index(folder)
        copy_files(beside, folder)
        if self._template.config:
            _write_config(self._plan, self._template, self._stored, folder / "config.json")
        write_chosen(self._plan, folder)
        if self._as_torch:
            from polymerge.checkpoints.writer import as_torch_files  # needs torch, which a merge does not

            as_torch_files(folder, {step.name: step.same_as for step in self._plan.steps if step.fate == "tied"})
        return _sizes(folder, "pytorch_model*.bin" if self._as_torch else "model*.safetensors")

    def counted(self) -> dict[str, Any]:
        steps = self._plan.steps
        return {
            "dtypes": {dtype_name(code): count for code, count in self._stored.tensors.items()},
            "rounded_by_template": list(self._stored.rounded),
            "tensors": dict(Counter(step.fate for step in steps)),
            "parameters": sum(prod(step.shape) for step in steps if step.fate != "tied"),
            "merged": [step.name for step in steps if step.fate == "merged"],
        }


class _AdapterWriter:
    """Writes an adapter's factors and full weights, in one file for PEFT or two for LLaVA, and its template's other
    files.
    """

    def __init__(self, plan: Plan, inputs: Sequence[Checkpoint], as_torch: bool) -> None:
        self._plan, self._inputs, self._as_torch = plan, inputs, as_torch
        apart = plan.layout == "llava" and any(step.lora is None for step in plan.steps)
        one_file = 1 << 62
        self.shards = lay_out(_tensors(plan, lora=True if apart else None), one_file, "adapter_model")
        if apart:
            self.shards = _beside(self.shards, lay_out(_tensors(plan, lora=False), one_file, "non_lora_trainables"))
        self.room = self.shards.room(as_torch)

    def finish(self, folder: Path, beside: Mapping[str, Path]) -> dict[str, int]:
        copy_files(beside, folder)
        config = _adapter_config(self._plan, self._inputs)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if self._as_torch:
            from polymerge.checkpoints.writer import as_torch_file  # needs torch, which a merge does not

            for file in sorted(folder.glob("*.safetensors")):
                as_torch_file(file, file.with_suffix(".bin"))
        return _sizes(folder, "*.safetensors", "*.bin")

    def counted(self) -> dict[str, Any]:
        modules = [(step, step.lora) for step in self._plan.steps if step.lora is not None]
        return {
            "modules": dict(Counter(step.fate for step, _ in modules)),
            "full_weights": [step.name for step in self._plan.steps if step.lora is None],
            "ranks": sorted({lora.rank for _, lora in modules}),
        }


def in_memory(plan: Plan, inputs: Sequence[Checkpoint], threads: int) -> tuple[Adapter, dict[Path, memoryview]]:
    """Carry out a plan of adapters in memory; return the merged adapter and the content of its files.

    raises CheckpointError if an adapter's values cannot be merged.
    """
    where = Path(f"in memory/{plan.hash}")
    buffers = {name: bytearray(byte_count(dtype, shape)) for name, dtype, shape in _tensors(plan)}

    def write(name: str, view: memoryview, start: int) -> None:
        buffers[name][start : start + len(view)] = view

    execute(plan, [one.entries for one in inputs], write, device=open_device("cpu"), threads=threads)
    factors, full = (
        [
            TensorInfo(name, dtype, shape, where / name, 0, len(buffers[name]))
            for name, dtype, shape in _tensors(plan, lora=lora)
        ]
        for lora in (True, False)
    )
    template, config = inputs[plan.template].adapter, _adapter_config(plan, inputs)
    assert template is not None
    apart = plan.layout == "llava" and bool(full)
    said = template.folder / CONFIG
    rules = read_lora_config(config, str(said))
    written = [(Contents(tuple(factors)), False), (Contents(tuple(full)), apart)]
    found, _ = sort_names(template.folder, written, wrapped=bool(rules.parameters))
    with collecting(needed=True):
        pairs, tokens = paired(found, rules, said), token_rows(found, rules, said)
    made = replace(
        template,
        config=config,
        layout="llava" if apart else "peft",
        pairs=pairs,
        non_lora=found.non_lora,
        tokens=tokens,
        files=tuple(tensor.file for tensor in (*factors, *full)),
        skipped={},
        beside=tuple(tensor.file for tensor in full) if apart else (),
        became={},
        left_out={},
        stamps={},
    )
    return made, {where / name: memoryview(buffer) for name, buffer in buffers.items()}


def _adapter_config(plan: Plan, inputs: Sequence[Checkpoint]) -> dict[str, Any]:
    """The output's adapter_config.json; it lists modules with full weights, except for LLaVA's loader."""
    config = dict(plan.config or {})
    if plan.layout == "llava":
        return config | {"modules_to_save": None}
    kept = {step.name for step in plan.steps if step.lora is None}
    brought = {
        name.rpartition(".")[0]
        for adapter in (one.adapter for one in inputs)
        if adapter is not None
        for name, entry in adapter.non_lora.items()
        if entry.file in adapter.beside and f"{PREFIX}{name}" in kept
    }
    return config | {"modules_to_save": sorted({*saved_modules(config), *brought}) or None}


def _tensors(plan: Plan, lora: bool | None = None) -> list[tuple[str, str, tuple[int, ...]]]:
    """Names, dtypes and shapes of the written tensors: only modules with factors if `lora`, else all others."""
    return [
        (name, dtype, shape)
        for step in plan.steps
        if lora is None or lora == (step.lora is not None)
        for name, (dtype, shape) in step.stored.items()
    ]


def _beside(one: Shards, other: Shards) -> Shards:
    """The files of both, in separate shards."""
    moved = {name: replace(place, shard=place.shard + len(one.names)) for name, place in other.places.items()}
    return Shards(
        (*one.names, *other.names),
        (*one.headers, *other.headers),
        (*one.sizes, *other.sizes),
        {**one.places, **moved},
        one.data_size + other.data_size,
    )


def _sizes(folder: Path, *patterns: str) -> dict[str, int]:
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    return {file.name: file.stat().st_size for file in files}


def _write_config(plan: Plan, template: Checkpoint, stored: Stored, file: Path) -> None:
    """Write the config.json of the output into a copy of the template's, changing no more than necessary."""
    before, config = read_bounded(file, CONFIG_BYTES) if file.exists() else b"", output_config(plan, template)
    text = before.decode("utf-8")
    if template.brought or config != template.config:
        text = json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n"
    after = stored.written_in(text).encode("utf-8")
    if after != before:
        file.write_bytes(after)
