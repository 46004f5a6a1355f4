"""Compute the tensors in which plans differ from their template, one plan after another; no checkpoint is written."""

from __future__ import annotations

import shutil
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from polymerge.checkpoints import Checkpoint, TensorInfo, open_checkpoint
from polymerge.checkpoints.beside import copy_files
from polymerge.checkpoints.folder import join
from polymerge.checkpoints.hub import locate
from polymerge.checkpoints.loading import DTYPES
from polymerge.dtypes import FP8, byte_count, dtype_name
from polymerge.engine.device import open_device
from polymerge.engine.executor import Execution
from polymerge.engine.extents import Files
from polymerge.engine.opening import (
    beside_output,
    entries_of,
    fetch,
    opened,
    opened_inputs,
    refuse_changes,
    with_stamps,
)
from polymerge.engine.writers import in_memory
from polymerge.errors import CheckpointError, RecipeError
from polymerge.families import quantization_method
from polymerge.families.fp8 import read_fp8
from polymerge.inference.overwrites import Overwrite
from polymerge.planning import Input, Plan, Step, make_plan
from polymerge.planning.adapter_places import base_named
from polymerge.planning.estimate import default_threads
from polymerge.planning.output_dtypes import stored_dtypes
from polymerge.planning.tokenizer_files import chooses_files, write_chosen

__all__ = ["TORCH", "MergedTensors", "bytes_of", "stored_tensor"]

Done = Callable[[Step, Tensor], None]

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""torch's dtypes by their safetensors names."""


class MergedTensors:
    """A template, and what plans make of its tensors.

    For a plan that merges adapters, the template is their base; the merged adapter, which is small, is kept in memory
    and folded into it.

    first      any of the plans to come, which share one template; with adapters, the one that folds them
    template   opened; `folder` is its place
    scales     names of the scales of its weights in fp8, which no model has as tensors
    count      tensors of the last plan

    raises CheckpointError where transformers could not load the template, or not what the plan makes of it.
    """

    def __init__(self, plan: Plan, *, device: str = "cpu", threads: int | None = None) -> None:
        self._device, self._threads = open_device(device), threads or default_threads()
        self.first = first = self._folded(plan)
        fetch(first)
        self._place = _place(first)
        recorded = first.inputs[first.template]
        self.template = template = with_stamps(opened(recorded))
        self._loaded = template.stamps
        self.stored = stored_dtypes(first.steps, template.config, first.recipe.get("dtype") is not None)
        self.scales = read_fp8(template.config, template.entries).beside
        self.folder = Path(self._place[0])
        if brought := template.brought:
            raise CheckpointError(
                f"{self.folder}: with its adapter it is another model ({brought[0]} is of that), and transformers "
                "cannot load what no folder holds. Fold the adapter first, and name the folder"
            )
        if first.vocabulary is not None and first.vocabulary.ids:
            raise CheckpointError(
                f"{self.folder}: with the tokenizer of '{first.vocabulary.tokenizer}' its config has to name other "
                "tokens, which a loaded model cannot be given. Merge it into a folder"
            )
        if why := _unloadable(recorded.wrappers, {} if self.scales else template.config):
            raise CheckpointError(
                f"{self.folder}: transformers cannot load it: {why}. Merge it alone first (linear, weight 1): the "
                "output has what its class loads"
            )
        self.processor_folder = self._processor_folder(first)
        self.count = 0
        self._changed: set[str] = set()
        self._inputs: tuple[Input, ...] = ()
        self._opened: list[Checkpoint] = []
        self._execution: Execution | None = None

    def dtype(self, asked: str) -> str:
        """The dtype in which the folder that the plan stands for would be loaded; `auto` if only transformers knows."""
        if asked == "auto" and (named := self.stored.loaded_in(self.template.config)) in DTYPES:
            asked = named
        if asked == "auto" and self.scales and self.stored.loaded:
            asked = dtype_name(self.stored.loaded)
        return asked

    @property
    def generation_config(self) -> Any:
        """The generation_config that a plan takes from another folder; None if it is the template's own."""
        if not any(taken.kind == "generation config" for taken in self.first.companions):
            return None
        return GenerationConfig.from_pretrained(str(self.processor_folder))

    def compute(self, plan: Plan, place: Callable[[Step], Tensor], done: Done | None = None) -> None:
        """Compute the tensors that a plan changes, and those again that the plan before changed and this one does not.

        place  the memory for a step's tensor, in the step's dtype, contiguous on the CPU
        done   called once with each tensor when it is complete, from any thread, one at a time

        raises RecipeError for a plan with another template, CheckpointError if values cannot be merged.
        """
        made = self._folded(plan)
        if _place(made) != self._place:
            raise RecipeError(f"live: this plan is of another template than the one that is loaded, {self.folder}")
        changed = {step.name for step in made.steps if step.pieces} | {one.name for one in made.overwrites}
        steps = [
            step if step.pieces else replace(step, fate="copied")
            for step in made.steps
            if step.name in changed | self._changed
        ]
        self._changed |= changed  # all of it, should this one fail
        self.count = len(steps)
        receiving = _Receiving(steps, made.overwrites, place, done)
        try:
            self._executing(made.inputs).run(replace(made, steps=tuple(steps)), receiving.write)
            refuse_changes(self._opened, self._loaded)
        except BaseException:
            self.close()  # what is still queued is of a plan that failed
            raise
        assert receiving.complete
        self._changed = changed

    def _executing(self, inputs: tuple[Input, ...]) -> Execution:
        """The execution of the last plan, with its caches, if this one reads the same inputs."""
        if self._execution is None or inputs != self._inputs:
            self.close()
            self._opened = [with_stamps(opened(entry)) for entry in inputs]
            entries = entries_of(self._opened)
            self._execution = Execution(
                entries, device=self._device, threads=self._threads, again=True, memory=self._memory
            )
            self._inputs = inputs
        return self._execution

    def close(self) -> None:
        """Release threads and files."""
        if self._execution is not None:
            self._execution.close()
            self._execution = None

    def _folded(self, plan: Plan) -> Plan:
        """The plan itself, or the plan that folds its merged adapter, kept in memory, into the base."""
        self._memory: dict[Path, memoryview] = {}
        if plan.config is None:
            return plan
        base = plan.recipe.get("base_model") or base_named(plan.config)
        if not base:
            raise RecipeError("live: the adapters' config names no base. Say which model they were trained on")
        fetch(plan)
        inputs = [with_stamps(one) for one in opened_inputs(plan)]
        adapter, self._memory = in_memory(plan, inputs, self._threads)
        refuse_changes(inputs)
        source = f"{base}+{plan.hash}"
        joined = join(open_checkpoint(source, locate(base)), adapter)
        return make_plan({"merge_method": "copy", "models": [source]}, opened={source: joined})

    def _processor_folder(self, plan: Plan) -> Path:
        """The folder to load the processor from: the template's, or a copy with the files that a plan has instead."""
        if not plan.companions and not chooses_files(plan):
            return self.folder
        folder = Path(mkdtemp(prefix="polymerge-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        copy_files(beside_output(plan, opened(plan.inputs[plan.template])), folder)
        write_chosen(plan, folder)
        return folder


class _Receiving:
    """Receives the bytes of steps from the threads of an execution, and tells which tensors are complete."""

    def __init__(
        self, steps: Sequence[Step], overwrites: Sequence[Overwrite], place: Callable[[Step], Tensor], done: Done | None
    ) -> None:
        self._steps, self._overwrites = {step.name: step for step in steps}, overwrites
        self._place, self._done = place, done
        self._tensors: dict[str, tuple[Tensor, memoryview]] = {}
        self._left = {step.name: byte_count(step.dtype, step.shape) for step in steps}
        self._counting, self._telling = threading.Lock(), threading.Lock()

    @property
    def complete(self) -> bool:
        """Whether every tensor has all of its bytes, each once."""
        return not any(self._left.values())

    def write(self, name: str, view: memoryview, start: int) -> None:
        """Write bytes of a tensor."""
        with self._counting:
            if name not in self._tensors:
                tensor = self._place(self._steps[name])
                self._tensors[name] = tensor, bytes_of(tensor)
            tensor, raw = self._tensors[name]
        raw[start : start + len(view)] = view
        with self._counting:
            self._left[name] -= len(view)
            if self._left[name]:
                return
            del self._tensors[name]
        with self._telling, torch.no_grad():
            for one in self._overwrites:
                if one.name == name:
                    one.carry_out(tensor)
            if self._done is not None:
                self._done(self._steps[name], tensor)


def _unloadable(wrappers: Sequence[str], config: Mapping[str, Any]) -> str:
    """Why transformers cannot load a folder that a plan can read; empty if it can."""
    if wrappers:
        return f"{wrappers[0].strip('.')}. stands in its tensor names"
    if (method := quantization_method(config)) is not None:
        return f"its config.json says that it is quantized ({method}), and its weights are plain"
    return ""


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    raw: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def stored_tensor(entry: TensorInfo | None, step: Step) -> Tensor:
    """A stored tensor of a checkpoint; if it is in fp8, or not stored so, room for what every plan writes."""
    if entry is None or entry.dtype in FP8:
        return torch.empty(step.shape, dtype=TORCH[step.dtype])
    tensor = torch.empty(entry.shape, dtype=TORCH[entry.dtype])
    files = Files()
    try:
        files.read(entry.file, entry.start, bytes_of(tensor))
    finally:
        files.close()
    return tensor


def _place(plan: Plan) -> tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]:
    """A key that identifies a template: its location and its tensors."""
    return plan.inputs[plan.template].path, tuple((step.name, step.shape) for step in plan.steps)
