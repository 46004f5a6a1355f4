"""Apply plans to a loaded model: merged tensors are recomputed in place, as often as needed."""

from __future__ import annotations

import copy
import os
import shutil
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from polymerge.checkpoints.loading import DTYPES, load_model, plain_loading, quiet
from polymerge.dtypes import FP8, dtype_name
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
from polymerge.engine.tokenizer_files import chooses_files, write_chosen
from polymerge.engine.writers import in_memory
from polymerge.errors import CheckpointError, RecipeError
from polymerge.families import quantization_method
from polymerge.families.fp8 import read_fp8
from polymerge.methods.own import MethodFiles
from polymerge.planning import Input, Plan, Step, make_plan
from polymerge.planning.adapter_places import base_named
from polymerge.planning.estimate import default_threads
from polymerge.planning.model import EMBEDDING, HEAD
from polymerge.planning.output_dtypes import stored_dtypes
from polymerge.planning.plan import IGNORED
from polymerge.recipe.recipe import Recipe

__all__ = ["LiveModel", "live"]

_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class LiveModel:
    """The template as loaded by transformers, whose merged tensors take the values of a plan.

    After `set(plan)` the model equals the one that `merge` writes for the same plan, once loaded: the
    weights are the same bits. No checkpoint is written. For a plan that merges adapters, the model is their base; the
    merged adapter, which is small, is kept in memory and folded into it.

    plan     any of the plans to come, which share one template
    device   for the model and for the blocks of a merge
    dtype    auto (that in which the folder would be loaded), or a torch dtype; merged values are rounded to the
             output's dtype first
    threads  of the merge; does not affect the result

    raises CheckpointError if the template does not load completely.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        threads: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._device, self._threads = open_device(device), threads or default_threads()
        first = self._folded(plan)
        fetch(first)
        self._template = _place(first)
        recorded = first.inputs[first.template]
        template = with_stamps(opened(recorded))
        self._loaded = template.stamps
        stored = stored_dtypes(first.steps, template.config, first.recipe.get("dtype") is not None)
        scales = read_fp8(template.config, template.entries).beside
        if dtype == "auto" and (named := stored.loaded_in(template.config)) in DTYPES:
            dtype = named
        if dtype == "auto" and scales and stored.loaded:
            dtype = dtype_name(stored.loaded)
        steps, unties = first.steps, any(step.canonical == HEAD and step.fate != "tied" for step in first.steps)
        rows = next((step.shape[0] for step in steps if step.canonical == EMBEDDING), None)
        self.folder = Path(self._template[0])
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
        ignored = [left.name for left in first.left_out if left.input == first.template and left.reason == IGNORED]
        if why := _unloadable(recorded.wrappers, {} if scales else template.config):
            raise CheckpointError(
                f"{self.folder}: transformers cannot load it: {why}. Merge it alone first (linear, weight 1): the "
                "output has what its class loads"
            )
        self.processor_folder = self._processor_folder(first)
        self.model: Any = load_model(
            self.folder,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            ignored=(*ignored, *scales),
            plainly=bool(scales),  # the bits of what is in fp8 as numbers, which `set` replaces by those numbers
        )
        if any(taken.kind == "generation config" for taken in first.companions):
            self.model.generation_config = GenerationConfig.from_pretrained(str(self.processor_folder))
        if rows is not None and rows != self.model.get_input_embeddings().weight.shape[0]:
            self.model.resize_token_embeddings(rows, mean_resizing=False)  # `set` gives all rows their numbers
        if unties:
            _untie(self.model)
        self._shadow = _Shadow(self.model, {step.name: step.shape for step in steps})
        self._held = {
            step.name: _stored(template.entries.get(step.name), step)
            for step in steps
            if step.name not in self._shadow.live_names
        }
        self._changed: set[str] = set()
        self._inputs: tuple[Input, ...] = ()
        self._opened: list[Checkpoint] = []
        self._execution: Execution | None = None

    def _processor_folder(self, plan: Plan) -> Path:
        """The folder to load the processor from: the template's, or a copy with the files that a plan has instead."""
        if not plan.companions and not chooses_files(plan):
            return self.folder
        folder = Path(mkdtemp(prefix="polymerge-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        copy_files(beside_output(plan, opened(plan.inputs[plan.template])), folder)
        write_chosen(plan, folder)
        return folder

    def set(self, plan: Plan) -> None:
        """Set the model's weights to this plan's; tensors that only an earlier plan changed are restored.

        raises RecipeError for a plan with another template, CheckpointError if values cannot be merged; the weights
        are then neither the old nor the new ones.
        """
        made = self._folded(plan)
        if _place(made) != self._template:
            raise RecipeError(f"live: this plan is of another template than the one that is loaded, {self.folder}")
        self._carry_out(made)

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

    def _carry_out(self, plan: Plan) -> None:
        changed = {step.name for step in plan.steps if step.pieces} | {one.name for one in plan.overwrites}
        steps = tuple(
            step if step.pieces else replace(step, fate="copied")
            for step in plan.steps
            if step.name in changed | self._changed
        )
        self._changed |= changed  # all of it, should this one fail
        staged = {step.name: self._target(step) for step in steps}
        views = {name: _bytes(tensor) for name, tensor in staged.items()}

        def write(name: str, view: memoryview, start: int) -> None:
            views[name][start : start + len(view)] = view

        try:
            self._executing(plan.inputs).run(replace(plan, steps=steps), write)
            refuse_changes(self._opened, self._loaded)
        except BaseException:
            self.close()  # what is still queued is of a plan that failed
            raise
        with torch.no_grad():
            for one in plan.overwrites:
                one.carry_out(staged[one.name])
            for name, tensor in staged.items():
                live = self._live(name)
                if live is not None and live.data_ptr() != tensor.data_ptr():
                    live.copy_(tensor)
            if self._held:
                self._shadow.refill(self._held)
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
        """Release threads and files; the model keeps its weights."""
        if self._execution is not None:
            self._execution.close()
            self._execution = None

    def _live(self, name: str) -> Tensor | None:
        """The model's tensor for a stored one, if they are identical; None for one combined with others."""
        live = self._shadow.live_names.get(name)
        return None if live is None else self._shadow.parameters[live]

    def _target(self, step: Step) -> Tensor:
        """The destination of a step's bytes: the model itself if it holds the tensor unchanged, else a buffer."""
        live, dtype = self._live(step.name), _TORCH[step.dtype]
        if live is None:
            if self._held[step.name].dtype != dtype:
                self._held[step.name] = self._held[step.name].to(dtype)
            return self._held[step.name]
        if tuple(live.shape) != step.shape:
            raise CheckpointError(
                f"{self.folder}: {step.name} is {list(step.shape)} on disk and {list(live.shape)} in the loaded model"
            )
        if live.device.type == "cpu" and live.dtype == dtype and live.is_contiguous():
            return live
        return torch.empty(step.shape, dtype=dtype)


@contextmanager
def live(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe | Plan,
    *,
    methods: MethodFiles = (),
    device: str = "cpu",
    dtype: str = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> Iterator[LiveModel]:
    """A merged model in memory: its weights are the bits that `merge` would write, and no checkpoint is written.

    `live(recipe).model` is the model as transformers loads it; `set(plan(other))` switches to the weights of another
    recipe with the same template.

    recipe   a file, mapping or `Recipe`; or a `Plan`
    methods  Python files with methods of your own, as for `plan`. The others as for `LiveModel`

    raises Refused with every problem of the recipe, CheckpointError if the template does not load
    completely, or values cannot be merged.
    """
    plan = make_plan(recipe, methods=methods)
    model = LiveModel(plan, device=device, dtype=dtype, threads=threads, trust_remote_code=trust_remote_code)
    try:
        model.set(plan)
        yield model
    finally:
        model.close()


class _Shadow:
    """Maps stored tensors to tensors of a loaded model, by loading markers that take no memory.

    Names in memory are internal to transformers and change with its versions, so they are not computed: markers are
    loaded instead of the weights, and each tensor is identified by its marker.

    live_names  name on disk -> name in memory, except for tensors that transformers combines from several
    parameters  name in memory -> the model's tensor
    """

    def __init__(self, model: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._model, self._shapes = model, shapes
        self.parameters: Mapping[str, Tensor] = model.state_dict()
        self.live_names: dict[str, str] = {}
        for dtype in dict.fromkeys(tensor.dtype for tensor in self.parameters.values()):
            # a marker keeps its storage only where it need not be cast
            markers = self._markers(dtype)
            name_of = {tensor.untyped_storage().data_ptr(): name for name, tensor in markers.items()}
            for live, tensor in self._load(markers).items():
                name = name_of.get(tensor.untyped_storage().data_ptr())
                if name is not None and tensor.shape == markers[name].shape:
                    self.live_names.setdefault(name, live)

    def refill(self, held: Mapping[str, Tensor]) -> None:
        """Have transformers combine the tensors again that it builds from several, and copy the result into the
        model.
        """
        dtype = next(iter(self.parameters.values())).dtype
        known = set(self.live_names.values())
        for name, tensor in self._load({**self._markers(dtype), **held}).items():
            live = self.parameters[name]
            if name not in known and tensor.untyped_storage().nbytes() >= tensor.nbytes:
                live.copy_(tensor)

    def _markers(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: torch.zeros((), dtype=dtype).expand(shape) for name, shape in self._shapes.items()}

    def _load(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with quiet():
            loaded: Any = plain_loading(type(self._model))(
                None, config=copy.deepcopy(self._model.config), state_dict=dict(tensors), dtype=self._model.dtype
            )
        found: Mapping[str, Tensor] = loaded.state_dict()
        return found


def _unloadable(wrappers: Sequence[str], config: Mapping[str, Any]) -> str:
    """Why transformers cannot load a folder that a plan can read; empty if it can."""
    if wrappers:
        return f"{wrappers[0].strip('.')}. stands in its tensor names"
    if (method := quantization_method(config)) is not None:
        return f"its config.json says that it is quantized ({method}), and its weights are plain"
    return ""


def _untie(model: Any) -> None:
    """Give the model an independent head if transformers tied it to the embedding but a plan has a tensor for it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    raw: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def _stored(entry: TensorInfo | None, step: Step) -> Tensor:
    """A stored tensor of a checkpoint; if it is in fp8, or not stored so, room for what every plan writes."""
    if entry is None or entry.dtype in FP8:
        return torch.empty(step.shape, dtype=_TORCH[step.dtype])
    tensor = torch.empty(entry.shape, dtype=_TORCH[entry.dtype])
    files = Files()
    try:
        files.read(entry.file, entry.start, _bytes(tensor))
    finally:
        files.close()
    return tensor


def _place(plan: Plan) -> tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]:
    """A key that identifies a template: its location and its tensors."""
    return plan.inputs[plan.template].path, tuple((step.name, step.shape) for step in plan.steps)
