"""What is varied: one number of a recipe, for all tensors or for some."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import combinations
from typing import Any

from polymerge.errors import PolymergeError, RecipeError, did_you_mean
from polymerge.families.rules import PARTS
from polymerge.methods.table import METHODS, Parameter
from polymerge.recipe.recipe import Override, Recipe

__all__ = ["Knob", "parse_knob", "turn"]

Value = float | bool | str
Scope = tuple[tuple[int, int] | None, str | None]  # layers, match


@dataclass(frozen=True)
class Knob:
    """A parameter that is varied.

    name       as the user writes it: PARAMETER, PARAMETER[MODEL], PARAMETER@WHERE or both
    parameter  of the recipe's method
    model      place in the recipe's models whose own value it is; None where it is one for all
    template   place of the model whose weight makes up for it, so that all weights add up to 1; None where none does
    idle       places of models whose weights count for nothing, and so are not added up
    layers, match  the tensors that it is for; None for all
    """

    name: str
    parameter: Parameter
    model: int | None = None
    template: int | None = None
    layers: tuple[int, int] | None = None
    match: str | None = None
    idle: tuple[int, ...] = ()

    @property
    def scope(self) -> Scope:
        """The tensors that it is for."""
        return self.layers, self.match

    @property
    def everywhere(self) -> bool:
        """Whether it is for all tensors."""
        return self.scope == (None, None)

    @property
    def numeric(self) -> bool:
        """Whether its values have an order."""
        return self.parameter.kind in ("number", "count")

    @property
    def neutral(self) -> Value:
        """A value that it may take, whichever: what stands for it where its value does not matter."""
        match self.parameter.kind:
            case "choice":
                return self.parameter.choices[0]
            case "flag":
                return False
            case "count":
                return 1
        return min(max(0.0, self.parameter.low), self.parameter.high)


def parse_knob(
    text: str | None,
    recipe: Recipe,
    problems: list[PolymergeError],
    *,
    template: int | None = 0,
    keep_template: bool = False,
    idle: tuple[int, ...] = (),
) -> Knob | None:
    """Read what is to be varied: `weight` (of the second model), `weight[2]`, `scale`, `density@layers:0-5`, ...

    WHERE is layers:FIRST-LAST of the text tower, a part (text, vision, projector, audio) or a glob on canonical names.
    Without a text it is the weight, or the place between two models.

    template       the template's place among the recipe's models; None where only its layout is taken
    keep_template  leave the template's weight as the recipe has it; by default it is 1 minus all the others'
    idle           places of models that are the base of a method on deltas, whose weights count for nothing
    """
    row = METHODS[recipe.merge_method]
    can = {parameter.name: parameter for parameter in row.parameters}
    numbers = [name for name, parameter in can.items() if parameter.kind in ("number", "count")]
    if text is None:
        text = next((name for name, one in can.items() if name == "weight" or one.between), None)
        if text is None:
            hint = f"Say --vary {numbers[0]}" if numbers else "It has no parameter that could be varied"
            problems.append(RecipeError(f"{row.name} has no weight, so the recipe has no free parameter. {hint}"))
            return None
    said = re.fullmatch(r"(\w+)(?:\[(\d+)\])?(?:@(.+))?", text)
    name = said[1] if said else text
    if said is None or name not in can:
        hint = did_you_mean(name, can) if can else " It has no parameters."
        problems.append(RecipeError(f"--vary: {row.name} has no parameter '{name}'.{hint}"))
        return None
    parameter = can[name]
    layers, match = _where(said[3], problems)
    model, rest = None, None
    if said[2] is not None and not parameter.each:
        problems.append(RecipeError(f"--vary: {name} is one value for all models, not that of models[{said[2]}]"))
    elif parameter.name == "weight" or said[2] is not None:
        model = int(said[2]) if said[2] is not None else _second(len(recipe.models), template, idle)
        if model >= len(recipe.models):
            count = len(recipe.models)
            problems.append(
                RecipeError(
                    f"--vary: {text}: there is no models[{model}], the recipe has {count} model{'s' * (count > 1)}"
                )
            )
            return None
        if parameter.name == "weight" and not keep_template and model != template:
            rest = template
    return Knob(text, parameter, model, rest, layers, match, idle)


def _second(count: int, template: int | None, idle: Collection[int]) -> int:
    """The place of the model whose weight is varied unless one is said: the second, or the first beside a template."""
    own = [place for place in range(count) if place not in idle]
    beside = [place for place in own if place != template] if template is not None else own[1:] or own
    return beside[0] if beside else 1


def turn(recipe: Recipe, values: Mapping[Knob, Value]) -> Recipe:
    """The recipe with each knob at its value.

    What the recipe's own overrides say of some tensors they go on saying; a knob that is for some tensors turns the
    rest of them. Where two such knobs meet, both are turned.

    raises RecipeError where the other models' weights, which the template's makes up for, are not said, and where it
    cannot be told whether two knobs meet.
    """
    whole = {knob: value for knob, value in values.items() if knob.everywhere}
    scoped = {knob: value for knob, value in values.items() if not knob.everywhere}
    turned = _turn_all(recipe, whole)
    return replace(turned, overrides=(*recipe.overrides, *_overrides(turned, scoped)))


def _turn_all(recipe: Recipe, values: Mapping[Knob, Value]) -> Recipe:
    own: dict[int, dict[str, Any]] = {place: dict(one.parameters) for place, one in enumerate(recipe.models)}
    general = dict(recipe.parameters)
    for knob, value in values.items():
        name = knob.parameter.name
        if knob.model is None:
            general[name] = value
            for one in own.values():
                one.pop(name, None)
        else:
            own[knob.model][name] = value
    for knob in values:
        if knob.template is not None:
            said = [one.get("weight", general.get("weight")) for one in own.values()]
            own[knob.template]["weight"] = _complement(said, knob)
    models = tuple(replace(one, parameters=own[place]) for place, one in enumerate(recipe.models))
    return replace(recipe, models=models, parameters=general)


def _overrides(recipe: Recipe, values: Mapping[Knob, Value]) -> tuple[Override, ...]:
    """What is varied for some tensors only: first where several scopes meet, then each by itself."""
    scopes = list(dict.fromkeys(knob.scope for knob in values))
    made = []
    for count in range(len(scopes), 0, -1):
        for some in combinations(scopes, count):
            where = _meeting(some)
            if where is not None:
                inside = {knob: value for knob, value in values.items() if knob.scope in some}
                made.append(_override(recipe, where, inside))
    return tuple(made)


def _meeting(scopes: Sequence[Scope]) -> Scope | None:
    """The tensors that several scopes have in common, None where there are none."""
    ranges = [layers for layers, _ in scopes if layers is not None]
    globs = list(dict.fromkeys(match for _, match in scopes if match is not None))
    layers = (max(first for first, _ in ranges), min(last for _, last in ranges)) if ranges else None
    if layers is not None and layers[0] > layers[1]:
        return None
    if len(globs) > 1:
        parts = {glob.partition(".")[0] for glob in globs}
        if len(parts) == len(globs) and not any(set("*?[") & set(part) for part in parts):
            return None  # of different parts
        raise RecipeError(
            f"--vary: '{globs[0]}' and '{globs[1]}' may have tensors in common. Say one of them by its layers"
        )
    return layers, globs[0] if globs else None


def _override(recipe: Recipe, where: Scope, values: Mapping[Knob, Value]) -> Override:
    parameters: dict[str, Any] = {}
    for knob, value in values.items():
        name = knob.parameter.name
        if knob.model is None:
            parameters[name] = value
        else:
            said = parameters.get(name) or [_said(recipe, place, name) for place in range(len(recipe.models))]
            said[knob.model] = value
            parameters[name] = said
    for knob in values:
        if knob.template is not None:
            parameters["weight"][knob.template] = _complement(parameters["weight"], knob)
    return Override(layers=where[0], match=where[1], parameters=parameters)


def _complement(said: Sequence[Any], knob: Knob) -> float:
    """What is left of 1, counted in decimals as a person would: 0.7 beside 0.3."""
    others = [weight for place, weight in enumerate(said) if place != knob.template and place not in knob.idle]
    if any(not isinstance(weight, int | float) for weight in others):
        raise RecipeError(
            f"--vary {knob.name}: the template's weight is 1 minus the others', and not every other model says "
            "its own. Say a weight for each in the recipe, or --keep-template-weight"
        )
    return float(1 - sum(Decimal(repr(float(weight))) for weight in others))


def _said(recipe: Recipe, place: int, name: str) -> Any:
    own = recipe.models[place].parameters
    return own.get(name, recipe.parameters.get(name))


def _where(text: str | None, problems: list[PolymergeError]) -> tuple[tuple[int, int] | None, str | None]:
    if text is None:
        return None, None
    if text in PARTS:
        return None, f"{text}.*"
    if text.startswith("layers:"):
        said = re.fullmatch(r"layers:(\d+)(?:-(\d+))?", text)
        if said is None or int(said[2] or said[1]) < int(said[1]):
            problems.append(RecipeError(f"--vary: '{text}' is no range of layers; write layers:0-5"))
            return None, None
        return (int(said[1]), int(said[2] or said[1])), None
    return None, text
