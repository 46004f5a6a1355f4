"""Merges of models that count alike, as recipes: every method by its row in the table, each with a scale to search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from polymerge.methods.method import Method
from polymerge.methods.table import METHODS

__all__ = ["DENSITY", "NORMS", "Case", "of_the_table"]

DENSITY = 0.2  # of methods that keep a share of each delta and default to all
NORMS = (0.18, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
"""The sizes of merges that a search can try."""


@dataclass(frozen=True)
class Case:
    """A merge of models by one method, each with the same weight.

    A method that takes one or two models joins the first two, then the third to what that gives, and so on, such that
    all weigh alike where it has weights. A merge of checkpoints without a scale of its own, or by steps, gets it from a
    last stage, `task_arithmetic` of what it has made; adapters, which have no stages, by their weights.

    weight   of each model; None where the method has none, or its own default
    on_base  whether checkpoints are merged as deltas by a method that could do without
    """

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    weight: float | None = None
    on_base: bool = True

    @property
    def row(self) -> Method:
        """The method's row in the table."""
        return METHODS[self.method]

    @property
    def power(self) -> int:
        """Of the scale, that the norm grows with: where A and B are merged apart, each of them carries it."""
        apart = self.parameters.get("space") == "factors" or self.row.scales
        return 2 if apart and self.parameters.get("compose") != "product" else 1

    def scale_for(self, wanted: float, norm: float) -> float:
        """The scale, to two digits, that makes a norm of a merge that has another as it is."""
        own = self.row.parameter("scale") if self._scales else None
        now = float(self.parameters.get("scale", own.default)) if own else 1.0
        return float(f"{now * (wanted / norm) ** (1 / self.power):.2g}")

    def recipe(self, models: Sequence[Path], base: Path | None = None, scale: float | None = None) -> dict[str, Any]:
        """The recipe for some models; adapters have no base."""
        if scale is not None and not self._scales and base is None:
            weighted = {"weight": (self.weight or 1.0) * scale, "parameters": {**self.parameters, "normalize": False}}
            return replace(self, **weighted).recipe(models)
        stages = self._stages([str(model) for model in models], base and str(base))
        if scale is not None and self._scales:
            stages[0]["parameters"]["scale"] = scale
        elif scale is not None:
            last = {"model": stages[-1]["name"], "parameters": {"weight": 1.0}}
            stages.append({
                "merge_method": "task_arithmetic", "base_model": str(base), "models": [last],
                "parameters": {"scale": scale},
            })  # fmt: skip
        stages[-1].pop("name", None)
        return stages[0] if len(stages) == 1 else {"stages": stages}

    @property
    def _scales(self) -> bool:
        """Whether its own scale multiplies all that the merge changes of the base."""
        return self.row.models is None and self.row.parameter("scale") is not None

    def _stages(self, models: Sequence[str], base: str | None) -> list[dict[str, Any]]:
        row = self.row
        if row.models is None:
            listed = [self._entry(model, self.weight) for model in models]
            return [self._stage("merged", listed, base if row.reads_base and self.on_base else None)]
        stages, last = [], models[0]
        for place, model in enumerate(models[1:], 1):
            if row.models == 1:
                listed, on = [{"model": model}], last
            else:
                listed = [self._entry(last, place), self._entry(model, 1)]
                on = base if row.reads_base and self.on_base else None
            stages.append(self._stage(f"merged-{place}", listed, on))
            last = f"merged-{place}"
        return stages

    def _stage(self, name: str, listed: list[dict[str, Any]], base: str | None) -> dict[str, Any]:
        on = {"base_model": base} if base else {}
        return {"name": name, "merge_method": self.method, **on, "models": listed, "parameters": {**self.parameters}}

    def _entry(self, model: str, weight: float | None) -> dict[str, Any]:
        return {"model": model} | ({} if weight is None else {"parameters": {"weight": weight}})


def of_the_table(takes: Callable[[Method], bool], count: int, more: Mapping[str, Any]) -> dict[str, Case]:
    """A merge of some models by each method that takes them and needs no number that nobody has a default for.

    more  parameters of the merges that have no rank of their own
    """
    cases = {}
    for name, row in METHODS.items():
        weight, density = row.parameter("weight"), row.parameter("density")
        weighs = weight is not None and weight.default is None
        asked = {one.name for one in row.parameters if one.default is None and not (one.optional or one.between)}
        if row.copies or not takes(row) or asked - {"weight"}:
            continue
        kept = {"density": DENSITY} if density and density.each else {}
        cases[name] = Case(name, {**kept, **({} if row.adds_ranks else more)}, 1 / count if weighs else None)
    return cases
