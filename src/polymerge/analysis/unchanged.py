"""A model as it is: the plan that leaves it so, and plans that change some of its layers only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from polymerge.checkpoints.folder import split_source
from polymerge.errors import PolymergeError, RecipeError
from polymerge.families.rules import text_layer
from polymerge.planning import Piece, Plan, Step, make_plan

__all__ = ["Intact", "depth_of", "open_intact", "restricted"]


@dataclass(frozen=True)
class Intact:
    """A model, a checkpoint or a base with an adapter, that nothing is merged into.

    plan    leaves every tensor as the model has it
    pieces  name on disk -> the canonical tensors that it holds, each with its rows
    """

    plan: Plan
    pieces: Mapping[str, tuple[Piece, ...]]

    @property
    def label(self) -> str:
        """Its short name in messages."""
        return self.plan.inputs[self.plan.template].label

    @property
    def depth(self) -> int:
        """How many layers its text tower has."""
        return depth_of(self.pieces)


def depth_of(pieces: Mapping[str, tuple[Piece, ...]]) -> int:
    """How many layers of a text tower some tensors are of."""
    layers = [text_layer(piece.canonical) for found in pieces.values() for piece in found]
    return max((layer + 1 for layer in layers if layer is not None), default=0)


def open_intact(
    source: str, what: str, problems: list[PolymergeError], family: str | None = None, ignore: Sequence[str] = ()
) -> Intact | None:
    """Open a model by its headers; None, with the problem said, where it cannot be knocked out layer by layer.

    source  a checkpoint, or BASE+ADAPTER
    what    what messages call it, such as MODEL
    family  where its config.json is silent
    ignore  globs on its names as stored: what is left out
    """
    model: dict[str, Any] = {"model": source} | ({"family": family} if family else {})
    model |= {"ignore": list(ignore)} if ignore else {}
    survey = planned({"merge_method": "linear", "models": [{**model, "parameters": {"weight": 1.0}}]}, problems)
    if survey is None:
        return None
    if survey.of_adapters:
        problems.append(RecipeError(f"{what}: {source} is an adapter alone. Say BASE+ADAPTER"))
        return None
    pieces = {step.name: step.pieces for step in survey.steps}
    if not depth_of(pieces):
        problems.append(
            RecipeError(
                f"{what}: {source} is of family '{survey.inputs[0].family}', whose tensors are not known by layer. "
                "`polymerge families` lists those that are"
            )
        )
        return None
    if split_source(source)[1] is None:
        steps = tuple(map(_as_it_is, survey.steps))
        return Intact(replace(survey, steps=steps, settings=()), pieces)
    folded = planned({"merge_method": "copy", "models": [model]}, problems)
    return Intact(folded, pieces) if folded is not None else None


def planned(recipe: Mapping[str, Any], problems: list[PolymergeError]) -> Plan | None:
    """The plan of a recipe; None, with the problems said, where there is none."""
    try:
        return make_plan(recipe)
    except PolymergeError as error:
        problems += error.problems
    return None


def restricted(plan: Plan, intact: Plan, keep: Callable[[str], bool]) -> Plan:
    """A plan in which only some canonical tensors are merged, and all others stay as `intact` has them.

    Both are of one template.
    """
    as_they_are = {step.name: step for step in intact.steps}
    return replace(plan, steps=tuple(_restricted(step, as_they_are[step.name], keep) for step in plan.steps))


def _restricted(step: Step, as_it_is: Step, keep: Callable[[str], bool]) -> Step:
    if not any(keep(piece.canonical) for piece in step.pieces):
        return as_it_is
    own = {piece.canonical: piece for piece in as_it_is.pieces}
    pieces = tuple(
        piece if keep(piece.canonical) else own.get(piece.canonical, Piece(piece.canonical, piece.rows))
        for piece in step.pieces
    )
    return replace(step, pieces=pieces)


def _as_it_is(step: Step) -> Step:
    if not step.pieces:
        return step
    return replace(step, fate="copied", dtype=step.source_dtype, pieces=(), reason="")
