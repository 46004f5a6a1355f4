"""Candidates: a recipe with its knobs turned, each planned like any other recipe."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

from polymerge.checkpoints.folder import split_source
from polymerge.checkpoints.hub import locate
from polymerge.errors import PolymergeError, RecipeError, refuse_if_any
from polymerge.methods.table import METHODS
from polymerge.planning import AdapterPlan, Plan, make_plan
from polymerge.planning.variation import varied
from polymerge.recipe.recipe import Recipe
from polymerge.tuning.knobs import Knob, parse_knob, turn
from polymerge.tuning.values import parse_span, parse_values

__all__ = ["DEFAULT_VALUES", "Point", "Space", "candidate_name", "plan_candidates", "read_space", "without_effect"]

Value = float | bool | str
Point = tuple[Value, ...]
DEFAULT_VALUES = "0:0.6:0.1"  # of a weight, as AdaMMS searches it (section 4.4)
MOST = 10_000
_LONGEST = 100


@dataclass(frozen=True)
class Space:
    """What is varied, and each knob's values: listed ones, or a span (low, high) that samplers draw from."""

    knobs: tuple[Knob, ...]
    values: tuple[tuple[Value, ...], ...]
    spans: tuple[tuple[float, float] | None, ...]

    def points(self) -> list[Point]:
        """Every combination of the listed values, in order."""
        return list(product(*self.values))

    def sweeps(self) -> list[list[Point]]:
        """For each knob all its values, of a span both ends, with the others at their first: each value stands once."""
        each = [span or listed for span, listed in zip(self.spans, self.values, strict=True)]
        first = tuple(values[0] for values in each)
        return [[(*first[:place], value, *first[place + 1 :]) for value in values] for place, values in enumerate(each)]

    def turned(self, recipe: Recipe, point: Point) -> Recipe:
        """The recipe of a point."""
        return turn(recipe, dict(zip(self.knobs, point, strict=True)))


def read_space(
    recipe: Recipe,
    vary: Sequence[str],
    values: str | None,
    problems: list[PolymergeError],
    *,
    keep_template: bool = False,
) -> Space:
    """Read what is varied: `NAME` with `values`, or any number of `NAME=VALUES`.

    Adds to `problems` what cannot be varied, and what is no value.
    """
    template: int | None = 0
    idle: tuple[int, ...] = ()
    try:
        template, idle = _roles(recipe)
    except PolymergeError as error:
        problems.append(error)
    knobs, listed, spans = [], [], []
    for text in vary or (None,):
        name, equals, own = text.partition("=") if text else (None, "", "")
        knob = parse_knob(name, recipe, problems, template=template, keep_template=keep_template, idle=idle)
        if equals and values is not None:
            problems.append(RecipeError(f"--vary {text} says its values, and so does --values: say them once"))
            continue
        where = f"--vary {name}" if equals else "--values"
        said = own if equals else values
        if knob is None:
            continue
        if said is None and knob.parameter.name != "weight":
            problems.append(RecipeError(f"--values: say which values of {knob.name} to try, such as 0:1:0.1"))
            continue
        try:
            span, points = _read(knob, DEFAULT_VALUES if said is None else said, where)
        except RecipeError as error:
            problems.append(error)
            continue
        knobs.append(knob)
        listed.append(points)
        spans.append(span)
    count = prod(len(own) or 1 for own in listed)
    if count > MOST:
        problems.append(RecipeError(f"--vary: {count} combinations are more than {MOST}; take larger steps"))
    twice = sorted({knob.name for knob in knobs if sum(knob.name == other.name for other in knobs) > 1})
    problems += [RecipeError(f"--vary: {name} is said twice") for name in twice]
    return Space(tuple(knobs), tuple(listed), tuple(spans))


def plan_candidates(recipe: Recipe, space: Space, points: Iterable[Point]) -> dict[str, Plan | AdapterPlan]:
    """Plan every candidate, by name; they differ in methods and parameters only.

    raises Refused with everything that is wrong with any of them.
    """
    plans: dict[str, Plan | AdapterPlan] = {}
    problems: list[PolymergeError] = []
    first: tuple[Plan, Recipe] | None = None
    for point in points:
        try:
            turned = space.turned(recipe, point)
            plan = (varied(*first, turned) if first else None) or make_plan(turned)
            first = first or ((plan, turned) if isinstance(plan, Plan) else None)
        except PolymergeError as error:
            problems += error.problems
            continue
        plans[candidate_name(space, point)] = plan
    refuse_if_any(problems)
    return plans


def without_effect(recipe: Recipe, space: Space) -> list[PolymergeError]:
    """What is varied without that anything which is merged changes: the recipe has no such free parameter.

    raises Refused with everything that is wrong with the first and the last value.
    """
    problems: list[PolymergeError] = []
    for knob, points in zip(space.knobs, space.sweeps(), strict=True):
        plans = plan_candidates(recipe, space, {points[0], points[-1]}).values()
        if len(points) > 1 and len({_effect(plan) for plan in plans}) == 1:
            problems.append(
                RecipeError(
                    f"--vary {knob.name}: nothing that the recipe merges depends on it: parts and exclude leave those "
                    "tensors out, or overrides say it themselves"
                )
            )
    return problems


def _effect(plan: Plan | AdapterPlan) -> str:
    """What a plan merges, and by which settings."""
    if isinstance(plan, Plan):
        return repr([(piece.canonical, setting) for _, piece, setting in plan.merged_pieces()])
    own = [(step.canonical, plan.settings[step.setting]) for step in plan.pairs if step.setting is not None]
    return repr((own, _effect(plan.extras) if plan.extras else ""))


def candidate_name(space: Space, point: Point) -> str:
    """The name of a candidate, and of its folder: `weight-0.3`."""
    text = ",".join(f"{knob.name}-{_word(value)}" for knob, value in zip(space.knobs, point, strict=True))
    plain = re.sub(r"[^\w.,\-]+", "_", text)
    if len(plain) <= _LONGEST:
        return plain
    return f"{plain[:_LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _word(value: Value) -> str:
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _read(knob: Knob, text: str, where: str) -> tuple[tuple[float, float] | None, tuple[Value, ...]]:
    parameter = knob.parameter
    if parameter.kind in ("flag", "choice"):
        known: Mapping[str, Value] = (
            {"true": True, "false": False}
            if parameter.kind == "flag"
            else {choice: choice for choice in parameter.choices}
        )
        wrong = [word for word in text.split(",") if word not in known]
        if wrong:
            raise RecipeError(f"{where}: {parameter.name} cannot be '{wrong[0]}'; it is one of {', '.join(known)}")
        return None, tuple(known[word] for word in text.split(","))
    span = parse_span(text, where)
    if span is not None:
        return span, ()
    values = parse_values(text, where)
    if parameter.kind == "count":
        if any(value != int(value) for value in values):
            raise RecipeError(f"{where}: {parameter.name} is a whole number, and '{text}' has others")
        return None, tuple(int(value) for value in values)
    return None, values


def _roles(recipe: Recipe) -> tuple[int | None, tuple[int, ...]]:
    """Where the template stands among the recipe's models, and which of them are a base that weighs nothing.

    Both are as a plan finds them; the template stands nowhere where only its layout is taken.
    """
    said: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for parameter in METHODS[recipe.merge_method].parameters:
        if parameter.default is None and not parameter.optional:
            (own if parameter.each else said)[parameter.name] = max(1.0, parameter.low)
    models = tuple(replace(one, parameters=own) for one in recipe.models)
    plan = make_plan(replace(recipe, models=models, parameters={**recipe.parameters, **said}))
    if isinstance(plan, AdapterPlan):
        return plan.template, ()
    idle: tuple[int, ...] = ()
    if plan.base is not None and len(plan.models) < len(recipe.models):
        base = plan.inputs[plan.base]
        paths = [tuple(str(locate(one)) if one else "" for one in split_source(entry.model)) for entry in recipe.models]
        idle = tuple(place for place, path in enumerate(paths) if path == (base.path, base.adapter))
    if plan.template not in plan.models:
        return None, idle
    left = [place for place in range(len(recipe.models)) if place not in idle]
    place = plan.models.index(plan.template)
    return (left[place] if place < len(left) else None), idle
