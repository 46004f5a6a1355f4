"""Apply plans to a loaded model: merged tensors are recomputed in place, as often as needed."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from polymerge.checkpoints.loading import load_model, plain_loading, quiet
from polymerge.errors import CheckpointError
from polymerge.inference.merged_tensors import TORCH, MergedTensors, stored_tensor
from polymerge.methods.own import MethodFiles
from polymerge.planning import Plan, Step, make_plan
from polymerge.planning.model import EMBEDDING, HEAD
from polymerge.planning.plan import IGNORED
from polymerge.recipe.recipe import Recipe

__all__ = ["LiveModel", "live"]


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
        self._merged = merged = MergedTensors(plan, device=device, threads=threads)
        self.folder, self.processor_folder = merged.folder, merged.processor_folder
        first, steps = merged.first, merged.first.steps
        unties = any(step.canonical == HEAD and step.fate != "tied" for step in steps)
        rows = next((step.shape[0] for step in steps if step.canonical == EMBEDDING), None)
        ignored = [left.name for left in first.left_out if left.input == first.template and left.reason == IGNORED]
        self.model: Any = load_model(
            self.folder,
            device=device,
            dtype=merged.dtype(dtype),
            trust_remote_code=trust_remote_code,
            ignored=(*ignored, *merged.scales),
            plainly=bool(merged.scales),  # the bits of what is in fp8 as numbers, which `set` replaces by those numbers
        )
        if (config := merged.generation_config) is not None:
            self.model.generation_config = config
        if rows is not None and rows != self.model.get_input_embeddings().weight.shape[0]:
            self.model.resize_token_embeddings(rows, mean_resizing=False)  # `set` gives all rows their numbers
        if unties:
            _untie(self.model)
        self._shadow = _Shadow(self.model, {step.name: step.shape for step in steps})
        self._held = {
            step.name: stored_tensor(merged.template.entries.get(step.name), step)
            for step in steps
            if step.name not in self._shadow.live_names
        }

    def set(self, plan: Plan) -> None:
        """Set the model's weights to this plan's; tensors that only an earlier plan changed are restored.

        raises RecipeError for a plan with another template, CheckpointError if values cannot be merged; the weights
        are then neither the old nor the new ones.
        """
        staged: dict[str, Tensor] = {}

        def place(step: Step) -> Tensor:
            staged[step.name] = self._target(step)
            return staged[step.name]

        self._merged.compute(plan, place)
        with torch.no_grad():
            for name, tensor in staged.items():
                live = self._live(name)
                if live is not None and live.data_ptr() != tensor.data_ptr():
                    live.copy_(tensor)
            if self._held:
                self._shadow.refill(self._held)

    def close(self) -> None:
        """Release threads and files; the model keeps its weights."""
        self._merged.close()

    def _live(self, name: str) -> Tensor | None:
        """The model's tensor for a stored one, if they are identical; None for one combined with others."""
        live = self._shadow.live_names.get(name)
        return None if live is None else self._shadow.parameters[live]

    def _target(self, step: Step) -> Tensor:
        """The destination of a step's bytes: the model itself if it holds the tensor unchanged, else a buffer."""
        live, dtype = self._live(step.name), TORCH[step.dtype]
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


def _untie(model: Any) -> None:
    """Give the model an independent head if transformers tied it to the embedding but a plan has a tensor for it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
