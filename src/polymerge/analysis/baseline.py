"""The baseline: a plan that leaves a model unchanged, and the layers of its text tower."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from polymerge.checkpoints.folder import split_source
from polymerge.dtypes import FP8
from polymerge.errors import PolymergeError, RecipeError, collecting, refuse
from polymerge.families.rules import text_layer
from polymerge.planning import Piece, Plan, Step, make_plan
from polymerge.planning.text_words import ranges
from polymerge.recipe.recipe import Recipe

__all__ = [
    "BASELINE",
    "THIRDS",
    "Baseline",
    "layer_words",
    "layers_in",
    "open_baseline",
    "plan_or_refuse",
    "restricted",
    "third_of",
]

BASELINE = "baseline"
"""The name under which a run stores the answers of the unchanged model."""

THIRDS = ("early", "middle", "late")


@dataclass(frozen=True)
class Baseline:
    """An unchanged model: a checkpoint, or a base with an adapter.

    plan    leaves every tensor unchanged
    pieces  name on disk -> the canonical tensors that it holds, each with its rows
    """

    plan: Plan
    pieces: Mapping[str, tuple[Piece, ...]]

    @property
    def label(self) -> str:
        """Its label in messages."""
        return self.plan.inputs[self.plan.template].label

    @property
    def depth(self) -> int:
        """The number of layers of its text tower."""
        return _depth(self.pieces)


def open_baseline(source: str, what: str, family: str | None = None, ignore: Sequence[str] = ()) -> Baseline | None:
    """Open a model from its headers; None, with the error refused, unless the layers of its text tower are known.

    source  a checkpoint, or BASE+ADAPTER
    what    its role in messages, such as `model`
    family  for a model whose config.json does not tell
    ignore  globs of names as stored, of tensors to leave out
    """
    model: dict[str, Any] = {"model": source} | ({"family": family} if family else {})
    model |= {"ignore": list(ignore)} if ignore else {}
    survey = plan_or_refuse({"merge_method": "linear", "models": [{**model, "parameters": {"weight": 1.0}}]})
    if survey is None:
        return None
    if survey.of_adapters:
        refuse(RecipeError(f"{what}: {source} is an adapter alone. Say BASE+ADAPTER"))
        return None
    pieces = {step.name: step.pieces for step in survey.steps}
    if not _depth(pieces):
        refuse(
            RecipeError(
                f"{what}: {source} is of family '{survey.inputs[0].family}', whose tensors are not known by layer. "
                "`polymerge families` lists those that are"
            )
        )
        return None
    computed = split_source(source)[1] is not None or any(step.source_dtype in FP8 for step in survey.steps)
    if not computed:
        return Baseline(replace(survey, steps=tuple(map(_copied, survey.steps)), settings=()), pieces)
    folded = plan_or_refuse({"merge_method": "copy", "models": [model]})
    return Baseline(folded, pieces) if folded is not None else None


def plan_or_refuse(recipe: Mapping[str, Any] | Recipe, where: str = "") -> Plan | None:
    """Plan a recipe; None, with each error refused after the prefix `where`, if there is no plan."""
    made = None
    with collecting() as found:
        try:
            made = make_plan(recipe)
        except PolymergeError as error:
            refuse(error)
        found[:] = [type(one)(f"{where}{one}") for one in found] if where else found
    return None if found else made


def restricted(plan: Plan, baseline: Plan, keep: Callable[[str], bool]) -> Plan:
    """Restrict a plan to the canonical tensors for which `keep` is true, and leave others as in the baseline.

    Both plans have the same template.
    """
    before = {step.name: step for step in baseline.steps}
    return replace(plan, steps=tuple(_restricted(step, before[step.name], keep) for step in plan.steps))


def _restricted(step: Step, before: Step, keep: Callable[[str], bool]) -> Step:
    if not any(keep(piece.canonical) for piece in step.pieces):
        return before
    own = {piece.canonical: piece for piece in before.pieces}
    pieces = tuple(
        piece if keep(piece.canonical) else own.get(piece.canonical, Piece(piece.canonical, piece.rows))
        for piece in step.pieces
    )
    return replace(step, pieces=pieces)


def _copied(step: Step) -> Step:
    return replace(step, fate="copied", dtype=step.source_dtype, pieces=(), reason="") if step.pieces else step


def _depth(pieces: Mapping[str, Sequence[Piece]]) -> int:
    layers = [text_layer(piece.canonical) for found in pieces.values() for piece in found]
    return max((layer + 1 for layer in layers if layer is not None), default=0)


def third_of(layers: Sequence[int], depth: int) -> str:
    """The third of a tower that contains the midpoint of the given layers."""
    return THIRDS[3 * (layers[0] + layers[-1] + 1) // (2 * depth)]


def layers_in(third: str, depth: int) -> tuple[int, ...]:
    """The layers of a third; a tower of two layers has none in the middle."""
    return tuple(layer for layer in range(depth) if third_of((layer,), depth) == third)


def layer_words(layers: Sequence[int]) -> str:
    """Format layers, such as `3` or `0-3,7`."""
    return ranges(layers).replace(", ", ",")
