"""The knockouts' replacements: the modules and layers replaced, the new values, and the plan of each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polymerge.analysis.baseline import Baseline, layer_words, plan_or_refuse, restricted
from polymerge.engine.statistics import draw_keys
from polymerge.errors import MissingExtraError, RecipeError, collecting, did_you_mean, refuse
from polymerge.families.expressions import Stacked
from polymerge.families.rules import text_layer
from polymerge.planning import Plan

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "KINDS",
    "MODULES",
    "Cell",
    "Noise",
    "Replacement",
    "Uniform",
    "Zero",
    "knocked_out",
    "make_cells",
    "plan_parent",
]

MODULES = {"attention": ("self_attn",), "mlp": ("mlp",), "both": ("self_attn", "mlp")}
"""The components of canonical names that belong to each module."""

KINDS = ("uniform", "zero", "noise", "from")


@dataclass(frozen=True)
class Cell:
    """A module in some layers of the text tower: the scope of one knockout.

    module  one of `MODULES`
    layers  in ascending order, numbered as in canonical names
    """

    module: str
    layers: tuple[int, ...]

    @property
    def name(self) -> str:
        """`attention-3`, or `both-0-3`."""
        return f"{self.module}-{layer_words(self.layers)}"

    def covers(self, canonical: str) -> bool:
        """Return whether a tensor of this canonical name belongs to it."""
        return text_layer(canonical) in self.layers and canonical.split(".")[3] in MODULES[self.module]


def make_cells(
    modules: Sequence[str], layers: Sequence[int] | None, stride: int | None, group: int, depth: int | None
) -> list[Cell]:
    """Every cell of a knockout, module by module; empty, with the errors refused, if anything is wrong.

    modules  out of `MODULES`
    layers   layers to knock out; None for all
    stride   distance between the starts of groups; None for the group size. A shorter last group is a
             separate cell unless another one includes its last layer
    group    number of layers knocked out at a time
    depth    number of layers of the text tower; None if the model could not be opened
    """
    with collecting() as found:
        for module in modules:
            if module not in MODULES:
                refuse(RecipeError(f"modules: there is no module '{module}'.{did_you_mean(module, MODULES)}"))
        for name, number in (("stride", stride), ("group", group)):
            if number is not None and number < 1:
                refuse(RecipeError(f"{name}: {number} is not at least 1"))
        chosen = sorted(range(depth or 0) if layers is None else layers)
        beyond = sorted({layer for layer in chosen if depth is not None and layer >= depth})
        if beyond:
            refuse(RecipeError(f"layers: there is no layer {layer_words(beyond)}, the model has 0-{(depth or 0) - 1}"))
        twice = [layer for layer, count in Counter(chosen).items() if count > 1]
        if twice:
            refuse(RecipeError(f"layers: {layer_words(twice)} said twice"))
    if found:
        return []
    groups: list[tuple[int, ...]] = []
    for start in range(0, len(chosen), stride or group):
        one = tuple(chosen[start : start + group])
        if len(one) == group or not any(one[-1] in other for other in groups):
            groups.append(one)
    return [Cell(module, one) for module in dict.fromkeys(modules) for one in groups]


@dataclass(frozen=True)
class Replacement:
    """The replacement of a module's weights.

    kind    one of `KINDS`
    source  for `from`: the checkpoint that weights come from
    size    for noise: its standard deviation as a multiple of the tensor's; 1 by default
    seed    for noise
    """

    kind: str = "uniform"
    source: str = ""
    size: float | None = None
    seed: int = 42

    def __str__(self) -> str:
        return f"{self.kind}:{self.source}" if self.source else self.kind

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that answers depend on."""
        more: dict[str, dict[str, Any]] = {
            "from": {"source": self.source},
            "noise": {"size": self._size, "seed": self.seed},
        }
        return {"kind": self.kind, **more.get(self.kind, {})}

    def check(self) -> None:
        """Refuse invalid settings."""
        if self.kind not in KINDS or (self.kind == "from") != bool(self.source):
            hint = " Say from:CHECKPOINT" if self.kind == "from" else did_you_mean(self.kind, KINDS)
            refuse(RecipeError(f"replace: '{self}' cannot take the place of weights.{hint}"))
        if self.size is not None and self.kind != "noise":
            refuse(RecipeError(f"noise_size: only noise has a size, and weights are replaced by '{self}'"))
        elif not (math.isfinite(self._size) and self._size > 0):
            refuse(RecipeError(f"noise_size: {self._size:g} is not above 0"))
        if self.seed < 0:
            refuse(RecipeError(f"seed: {self.seed} is not a whole number from 0"))

    def fill(self, canonical: str) -> Uniform | Zero | Noise:
        """The function that produces a tensor's new values, by its canonical name."""
        match self.kind:
            case "uniform":
                return Uniform()
            case "zero":
                return Zero()
        return Noise(draw_keys(self.seed, [0], canonical)[0], self._size)

    @property
    def _size(self) -> float:
        return 1.0 if self.size is None else self.size


@dataclass(frozen=True)
class Uniform:
    """Set every entry to 1 / out_features, as in the code of Bring Reason to Vision (Chen et al. 2025)."""

    def __call__(self, rows: Tensor) -> Tensor:
        """The new values of these rows, which are all of a matrix."""
        return rows.new_full(rows.shape, 1 / len(rows))


@dataclass(frozen=True)
class Zero:
    """Set every entry to 0."""

    def __call__(self, rows: Tensor) -> Tensor:
        """The new values of these rows."""
        return rows.new_zeros(rows.shape)


@dataclass(frozen=True)
class Noise:
    """Normal noise with mean 0 and a standard deviation of `size` times that of the entries it replaces.

    key  64 bits that depend only on seed and canonical name
    """

    key: int
    size: float

    def __call__(self, rows: Tensor) -> Tensor:
        """The new values of these rows."""
        import numpy as np
        import torch

        deviation = float(np.std(rows.double().numpy()))
        drawn = np.random.Generator(np.random.Philox(key=self.key)).standard_normal(tuple(rows.shape), np.float32)
        return torch.from_numpy(drawn * np.float32(self.size * deviation))


def plan_parent(baseline: Baseline, source: str) -> Plan | None:
    """The plan that replaces every text tensor of a model by another model's; None, with the errors refused, if they
    do not fit.
    """
    recipe = {
        "merge_method": "linear",
        "template": baseline.plan.inputs[baseline.plan.template].source,
        "models": [{"model": source, "parameters": {"weight": 1.0}}],
        "parts": ["text"],
    }
    return plan_or_refuse(recipe, f"replace from:{source}: ")


def knocked_out(
    baseline: Baseline, cells: Sequence[Cell], replacement: Replacement, parent: Plan | None = None
) -> dict[str, Plan]:
    """The plan of each cell, by its name.

    Uniform, zero and noise replace the weight matrices of a module, not biases and norms. `from` replaces all of it.

    parent  for `from`: the result of `plan_parent`
    """
    canonical = {piece.canonical for pieces in baseline.pieces.values() for piece in pieces}
    for cell in cells:
        if not any(map(cell.covers, canonical)):
            refuse(RecipeError(f"'{baseline.label}' has no {cell.module} in layers {layer_words(cell.layers)}"))
    if parent is not None:
        return {cell.name: restricted(parent, baseline.plan, cell.covers) for cell in cells}
    try:
        from polymerge.inference.overwrites import Overwrite, Overwritten
    except ImportError as error:
        raise MissingExtraError(f"running a model needs {error.name}: pip install 'polymerge[transformers]'") from None
    own = {name: getattr(baseline.plan, name) for name in baseline.plan.__dataclass_fields__}
    steps = {step.name: step for step in baseline.plan.steps}
    plans: dict[str, Plan] = {}
    unclear: dict[str, tuple[int, ...]] = {}
    for cell in cells:
        overwrites = []
        for name, pieces in baseline.pieces.items():
            for piece in pieces:
                shape, view = steps[name].shape, steps[name].view
                view = view if isinstance(view, Stacked) else None
                if len(shape) >= 2 and cell.covers(piece.canonical):
                    if replacement.kind == "uniform" and len(shape) > 2 and view is None:
                        unclear[name] = shape
                    overwrites.append(Overwrite(name, piece.rows, replacement.fill(piece.canonical), view))
        plans[cell.name] = Overwritten(**own, overwrites=tuple(overwrites))
    if unclear:
        name, shape = next(iter(unclear.items()))
        refuse(
            RecipeError(
                f"replace uniform: '{baseline.label}': {name} is {list(shape)}: which of its dimensions is the "
                f"output's is not known ({len(unclear)} such tensors). Say zero or noise"
            )
        )
    return plans
