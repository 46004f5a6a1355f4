"""A plan carried out into a loaded model: what it merges is computed anew, in place, as often as wanted."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polymerge.checkpoint import Entry
from polymerge.errors import CheckpointError, RecipeError
from polymerge.generation.models import load_model, quiet
from polymerge.planning import Plan, Step
from polymerge.planning.estimate import default_threads
from polymerge.run.device import open_device
from polymerge.run.execute import execute
from polymerge.run.files import Files
from polymerge.run.inputs import reopen

__all__ = ["LiveModel"]

_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class LiveModel:
    """The template as transformers loads it, whose merged tensors take the values that a plan gives them.

    After `set(plan)` the model computes what the folder that `merge` writes for the same plan would, once loaded: the
    weights are the same bits. Nothing is written to disk.

    plan     any of the plans to come; they differ in methods and parameters only
    device   where the model runs, and the blocks of a merge are computed
    dtype    auto (as the config says), or a torch dtype; what was merged is rounded to the output's dtype first
    threads  of the merge; no bit depends on it

    raises CheckpointError where the template does not load with every weight in its place.
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
        template = plan.inputs[plan.template]
        self.folder = Path(template.path)
        self._device, self._threads = open_device(device), threads or default_threads()
        self._inputs = plan.inputs
        self._entries = [reopen(entry).entries for entry in plan.inputs]
        self.model: Any = load_model(self.folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        shapes = {name: entry.shape for name, entry in self._entries[plan.template].items()}
        # the tensors of an adapter that stands with the template are no names of the model's folder
        self._shadow = _Shadow(self.model, {step.name: shapes[step.name] for step in plan.steps})
        self._held = {
            name: self._stored(self._entries[plan.template][name])
            for name in shapes
            if name in {step.name for step in plan.steps} and name not in self._shadow.live_names
        }

    def set(self, plan: Plan) -> None:
        """Give the model the weights of this plan.

        raises RecipeError for a plan of other models, CheckpointError where values cannot be merged; the weights are
        then neither the old nor the new ones.
        """
        if plan.inputs != self._inputs:
            raise RecipeError("live: this plan is of other models than the one that is loaded")
        computed = tuple(step for step in plan.steps if step.pieces)
        staged = {step.name: self._target(step) for step in computed}
        views = {name: _bytes(tensor) for name, tensor in staged.items()}

        def write(name: str, view: memoryview, start: int) -> None:
            views[name][start : start + len(view)] = view

        execute(
            replace(plan, steps=computed), self._entries, write, device=self._device, threads=self._threads
        )  # fmt: skip
        with torch.no_grad():
            for name, tensor in staged.items():
                live = self._live(name)
                if live is not None and live.data_ptr() != tensor.data_ptr():
                    live.copy_(tensor)
            if self._held:
                self._shadow.refill(self._held)

    def _live(self, name: str) -> Tensor | None:
        """The model's tensor that a tensor on disk is, as it is; None for one that is put together with others."""
        live = self._shadow.live_names.get(name)
        return None if live is None else self._shadow.parameters[live]

    def _target(self, step: Step) -> Tensor:
        """Where a step's bytes go: into the model itself where it holds them as they are, else beside it."""
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

    def _stored(self, entry: Entry) -> Tensor:
        """A tensor of the template as it lies on disk."""
        tensor = torch.empty(entry.shape, dtype=_TORCH[entry.dtype])
        files = Files()
        try:
            files.read(entry.file, entry.start, _bytes(tensor))
        finally:
            files.close()
        return tensor


class _Shadow:
    """Which tensor of a loaded model each tensor on disk becomes, found by loading tensors that take no memory.

    Names in memory are transformers' own affair and change with its versions, so they are not computed: markers are
    loaded in place of the weights, and what is then a marker is the tensor that it was given for.

    live_names  name on disk -> name in memory; without those that transformers puts together from several
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
        """Let transformers put together again what it makes of several tensors, and give the model the result."""
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
            loaded: Any = type(self._model).from_pretrained(
                None, config=copy.deepcopy(self._model.config), state_dict=dict(tensors), dtype=self._model.dtype
            )
        found: Mapping[str, Tensor] = loaded.state_dict()
        return found


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    raw: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)
