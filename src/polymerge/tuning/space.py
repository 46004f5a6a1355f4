"""The candidates of a search: every point of the search space, planned like any other recipe."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

from polymerge.checkpoints.folder import split_source
from polymerge.checkpoints.hub import locate
from polymerge.errors import RecipeError, collecting, refuse
from polymerge.families.rules import text_layer
from polymerge.methods.table import METHODS
from polymerge.planning import Plan, make_plan
from polymerge.planning.variation import varied
from polymerge.recipe.recipe import Recipe
from polymerge.tuning.knobs import Axis, Knob, Roles, Value, axis_of, turn
from polymerge.tuning.schedules import BENDS

__all__ = ["Point", "Space", "candidate_name", "make_space", "plan_candidates", "refuse_idle"]

Point = tuple[Value, ...]
_MOST = 10_000
_LONGEST = 100


@dataclass(frozen=True)
class Space:
    """The search space, with one axis per knob."""

    axes: tuple[Axis, ...] = ()

    def points(self) -> list[Point]:
        """Every combination of the listed values, in order."""
        return list(product(*(axis.values for axis in self.axes)))

    def sweeps(self) -> list[list[Point]]:
        """For each axis all its values (both ends of a span), with the others at their first value, without
        duplicates.
        """
        each = [axis.span or axis.values for axis in self.axes]
        first = tuple(values[0] for values in each)
        return [[(*first[:place], value, *first[place + 1 :]) for value in values] for place, values in enumerate(each)]

    def turned(self, recipe: Recipe, point: Point) -> Recipe:
        """The recipe at a point."""
        return turn(recipe, dict(zip(self.axes, point, strict=True)))


def make_space(recipe: Recipe, knobs: Sequence[Knob], *, keep_template_weight: bool = False) -> Space:
    """The space spanned by knobs of a recipe; unsuitable knobs and values are refused.

    knobs  empty for the default one
    """
    roles, axes = Roles(), list[Axis]()
    with collecting():
        roles = _roles(recipe)
    for knob in knobs or (Knob(),):
        with collecting():
            axis = axis_of(knob, recipe, roles, keep_template_weight=keep_template_weight)
            if not knob.unread:
                axes.append(axis)
    count = prod(len(axis.values) or 1 for axis in axes)
    if count > _MOST:
        refuse(RecipeError(f"vary: {count} combinations are more than {_MOST}; take larger steps"))
    names = [axis.name for axis in axes]
    refuse(*(RecipeError(f"vary: {name} is said twice") for name in sorted(set(names)) if names.count(name) > 1))
    return Space(tuple(axes))


def plan_candidates(
    recipe: Recipe, space: Space, points: Iterable[Point], first: tuple[Plan, Recipe] | None = None
) -> dict[str, Plan]:
    """Plan every candidate, by name; they differ in methods and parameters only.

    first  another candidate's plan, from which theirs are derived where they can be, and its recipe

    raises Refused with every problem of any of them.
    """
    plans: dict[str, Plan] = {}
    with collecting():
        for point in points:
            with collecting():
                turned = space.turned(recipe, point)
                plan = (varied(*first, turned) if first else None) or make_plan(turned)
                first = first or (plan, turned)
                plans[candidate_name(space, point)] = plan
    return plans


def refuse_idle(recipe: Recipe, space: Space) -> None:
    """Refuse a knob without effect on anything merged: the recipe has no such free parameter.

    raises Refused with every problem of the first and the last value.
    """
    with collecting() as wrong:
        for axis, points in zip(space.axes, space.sweeps(), strict=True):
            if axis.depth in BENDS:
                continue  # where both ends have one value, as in the sweep, its layer makes no difference
            plans = plan_candidates(recipe, space, {points[0], points[-1]}).values()
            if not wrong and len(points) > 1 and len({_effect(plan) for plan in plans}) == 1:
                refuse(
                    RecipeError(
                        f"vary {axis.name}: nothing that the recipe merges depends on it: parts and exclude leave "
                        "those tensors out, or overrides say it themselves"
                    )
                )


def _effect(plan: Plan) -> str:
    """The merged tensors of a plan and their settings, as a key."""
    return repr([(piece.canonical, setting) for _, piece, setting in plan.merged_pieces()])


def candidate_name(space: Space, point: Point) -> str:
    """The name of a candidate, and of its folder: `weight-0.3`."""
    text = ",".join(f"{axis.name}-{_word(value)}" for axis, value in zip(space.axes, point, strict=True))
    plain = re.sub(r"[^\w.,\-]+", "_", text)
    if len(plain) <= _LONGEST:
        return plain
    return f"{plain[:_LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _word(value: Value) -> str:
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _roles(recipe: Recipe) -> Roles:
    """The roles of a recipe's models, as found by a plan."""
    if not recipe.models:  # which was refused where the recipe was parsed
        return Roles()
    said: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for parameter in METHODS[recipe.merge_method].parameters:
        if parameter.default is None and not parameter.optional:
            (own if parameter.each else said)[parameter.name] = max(1.0, parameter.low)
    models = tuple(replace(one, parameters=own) for one in recipe.models)
    plan = make_plan(replace(recipe, models=models, parameters={**recipe.parameters, **said}))
    layers = max((layer + 1 for step in plan.steps if (layer := text_layer(step.canonical)) is not None), default=0)
    if plan.of_adapters:
        return Roles(plan.template, layers=layers)
    idle: tuple[int, ...] = ()
    if plan.base is not None and len(plan.models) < len(recipe.models):
        base = plan.inputs[plan.base]
        paths = [tuple(str(locate(one)) if one else "" for one in split_source(entry.model)) for entry in recipe.models]
        idle = tuple(place for place, path in enumerate(paths) if path == (base.path, base.adapter))
    if plan.template not in plan.models:
        return Roles(None, idle, layers)
    left = [place for place in range(len(recipe.models)) if place not in idle]
    place = plan.models.index(plan.template)
    return Roles(left[place] if place < len(left) else None, idle, layers)
