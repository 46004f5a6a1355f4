"""What a knockout puts in the place of weights, and the plan that does it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polymerge.analysis.cells import Cell
from polymerge.analysis.unchanged import Intact, planned, restricted
from polymerge.engine.statistics import draw_keys
from polymerge.errors import MissingExtraError, PolymergeError, RecipeError, did_you_mean
from polymerge.planning import Plan

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KINDS", "Noise", "Replacement", "Uniform", "Zero", "knocked_out", "parse_replacement", "plan_parent"]

KINDS = ("uniform", "zero", "noise", "from:CHECKPOINT")


@dataclass(frozen=True)
class Replacement:
    """What takes the place of a module's weights.

    kind    uniform, zero, noise or from
    source  of `from`: the checkpoint
    size    of noise: what the tensor's own standard deviation is multiplied with
    seed    of noise
    """

    kind: str = "uniform"
    source: str = ""
    size: float = 1.0
    seed: int = 42

    @property
    def settings(self) -> dict[str, Any]:
        """What the answers depend on of it."""
        more: dict[str, dict[str, Any]] = {
            "from": {"source": self.source},
            "noise": {"size": self.size, "seed": self.seed},
        }
        return {"kind": self.kind, **more.get(self.kind, {})}

    @property
    def words(self) -> str:
        """As the command line has it."""
        return f"from:{self.source}" if self.kind == "from" else self.kind


def parse_replacement(text: str, size: float | None, seed: int, problems: list[PolymergeError]) -> Replacement:
    """Read `--replace`; what cannot be goes to `problems`.

    size  of noise; None where none was said
    """
    kind, colon, source = text.partition(":")
    if text not in ("uniform", "zero", "noise") and not (kind == "from" and source):
        hint = " Say from:CHECKPOINT" if kind == "from" else did_you_mean(kind if colon else text, KINDS)
        problems.append(RecipeError(f"--replace: '{text}' cannot take the place of weights.{hint}"))
    if size is not None and kind != "noise":
        problems.append(RecipeError(f"--noise-size is for --replace noise, and this is '{text}'"))
    elif size is not None and not (math.isfinite(size) and size > 0):
        problems.append(RecipeError(f"--noise-size: {size:g} is not above 0"))
    if seed < 0:
        problems.append(RecipeError(f"--seed: {seed} is not a whole number from 0"))
    return Replacement(kind, source, 1.0 if size is None else size, max(seed, 0))


def plan_parent(intact: Intact, source: str, problems: list[PolymergeError]) -> Plan | None:
    """The plan that gives a model every text tensor of another one; None, with the problems said, where none fits."""
    template = intact.plan.inputs[intact.plan.template].source
    models = [{"model": source, "parameters": {"weight": 1.0}}]
    found: list[PolymergeError] = []
    plan = planned(
        {"merge_method": "linear", "template": template, "models": models, "parts": ["text"]}, found
    )  # fmt: skip
    problems += [type(error)(f"--replace from:{source}: {error}") for error in found]
    return plan


def knocked_out(
    intact: Intact, cells: Sequence[Cell], replacement: Replacement, parent: Plan | None, problems: list[PolymergeError]
) -> dict[str, Plan]:
    """The plan of each cell, by its name.

    parent  of `from`: what `plan_parent` gives

    Uniform, zero and noise replace a module's weight matrices; biases and norms stay. `from` replaces all of it.
    """
    canonical = {piece.canonical for pieces in intact.pieces.values() for piece in pieces}
    for cell in cells:
        if not any(map(cell.covers, canonical)):
            problems.append(RecipeError(f"'{intact.label}' has no {cell.module} in layers {cell.where}"))
    if parent is not None:
        return {cell.name: restricted(parent, intact.plan, cell.covers) for cell in cells}
    try:
        from polymerge.inference.live import Overwrite, Overwritten
    except ImportError as error:
        raise MissingExtraError(f"running a model needs {error.name}: pip install 'polymerge[transformers]'") from None
    own = {name: getattr(intact.plan, name) for name in intact.plan.__dataclass_fields__}
    steps = {step.name: step for step in intact.plan.steps}
    plans: dict[str, Plan] = {}
    odd: dict[str, tuple[int, ...]] = {}
    for cell in cells:
        overwrites = []
        for name, pieces in intact.pieces.items():
            for piece in pieces:
                shape, view = steps[name].shape, steps[name].view
                if len(shape) >= 2 and cell.covers(piece.canonical):
                    if replacement.kind == "uniform" and len(shape) > 2 and view is None:
                        odd[name] = shape
                    overwrites.append(Overwrite(name, piece.rows, _fill(replacement, piece.canonical), view))
        plans[cell.name] = Overwritten(**own, overwrites=tuple(overwrites))
    if odd:
        name, shape = next(iter(odd.items()))
        problems.append(
            RecipeError(
                f"--replace uniform: '{intact.label}': {name} is {list(shape)}: which of its dimensions is the "
                f"output's is not known ({len(odd)} such tensors). Say zero or noise"
            )
        )
    return plans


def _fill(replacement: Replacement, canonical: str) -> Uniform | Zero | Noise:
    match replacement.kind:
        case "uniform":
            return Uniform()
        case "zero":
            return Zero()
    return Noise(draw_keys(replacement.seed, [0], canonical)[0], replacement.size)


@dataclass(frozen=True)
class Uniform:
    """Every entry becomes 1 / out_features, as in the code of Bring Reason to Vision (Chen et al. 2025)."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Give the numbers for a tensor, of which these are the rows."""
        return rows.new_full(rows.shape, 1 / len(rows))


@dataclass(frozen=True)
class Zero:
    """Every entry becomes 0."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Give the numbers for a tensor, of which these are the rows."""
        return rows.new_zeros(rows.shape)


@dataclass(frozen=True)
class Noise:
    """Normal noise around 0, whose standard deviation is `size` times that of the entries it replaces.

    key  64 bits that nothing but seed and canonical name go into
    """

    key: int
    size: float

    def __call__(self, rows: Tensor) -> Tensor:
        """Give the numbers for a tensor, of which these are the rows."""
        import numpy as np
        import torch

        deviation = float(np.std(rows.double().numpy()))
        drawn = np.random.Generator(np.random.Philox(key=self.key)).standard_normal(tuple(rows.shape), np.float32)
        return torch.from_numpy(drawn * np.float32(self.size * deviation))
