"""What is varied: a parameter of a recipe, for all or some tensors, and the recipe at a value."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import combinations
from typing import Any

from polymerge.errors import RecipeError, did_you_mean
from polymerge.methods.method import Parameter
from polymerge.methods.table import METHODS
from polymerge.recipe.recipe import Override, Recipe
from polymerge.tuning.schedules import BENDS, Depth, numbers_over_depth, schedule_at

__all__ = ["Axis", "Knob", "Roles", "Value", "axis_of", "turn"]

Value = float | bool | str
Scope = tuple[tuple[int, int] | None, str | None]  # layers, match

DEFAULT_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
"""Values of a weight in AdaMMS's search (section 4.4)."""


@dataclass(frozen=True)
class Knob:
    """A parameter to vary, as given by the user.

    parameter  of the recipe's method; by default the weight, or slerp's t
    values     to try; by default, for a weight, from 0 to 0.6 in steps of 0.1
    span       lowest and highest value, instead of `values`, for samplers that draw from it
    model      index of the model whose own value it is; by default the second model for a weight, and for anything
               else one value for all
    layers     first and last layer of the text tower that it applies to; by default all
    part       text, vision, projector or audio, if it applies to only one
    match      a glob on canonical names, if it applies to only some tensors
    depth      what of a schedule over the layers it is: its value in the first or in the last layer, or the layer of
               its knee or its step (see `schedules.schedule_at`), which by default may be any but the first
    unread     its values or layers were already refused, so that they are missing is no error of its own
    """

    parameter: str | None = None
    values: tuple[Value, ...] = ()
    span: tuple[float, float] | None = None
    model: int | None = None
    layers: tuple[int, int] | None = None
    part: str | None = None
    match: str | None = None
    depth: Depth | None = None
    unread: bool = False

    @property
    def scope(self) -> Scope:
        """The tensors that it applies to: layers, and a glob."""
        return self.layers, f"{self.part}.*" if self.part else self.match

    def name(self, parameter: str) -> str:
        """Its name in files and tables: PARAMETER, PARAMETER[MODEL], PARAMETER@WHERE or both."""
        where = f"depth:{self.depth}" if self.depth else self.part or self.match
        if self.layers:
            first, last = self.layers
            where = f"layers:{first}" if first == last else f"layers:{first}-{last}"
        return f"{parameter}{'' if self.model is None else f'[{self.model}]'}{f'@{where}' if where else ''}"


@dataclass(frozen=True)
class Roles:
    """The roles of a recipe's models in its plan.

    template  the template's index among them; None if it only provides the layout
    idle      indices of those that are the base of a method on deltas, whose weights have no effect
    layers    number of layers that a schedule is over
    """

    template: int | None = 0
    idle: tuple[int, ...] = ()
    layers: int = 0


@dataclass(frozen=True)
class Axis:
    """A knob of a recipe with its values: an axis of the search space.

    values     ascending if ordered; empty with a span
    model      index of the model whose own value it is; None if shared by all
    template   index of the model whose weight compensates, so that all weights sum to 1; None if none does
    idle       indices of models whose weights are not included in that sum
    scope      the tensors that it applies to
    depth      what of a schedule over `layers` it is
    """

    name: str
    parameter: Parameter
    values: tuple[Value, ...] = ()
    span: tuple[float, float] | None = None
    model: int | None = None
    template: int | None = None
    idle: tuple[int, ...] = ()
    scope: Scope = (None, None)
    depth: Depth | None = None
    layers: int = 0

    @property
    def everywhere(self) -> bool:
        """Whether it applies to all tensors."""
        return self.scope == (None, None)

    @property
    def numeric(self) -> bool:
        """Whether its values are ordered."""
        return self.parameter.kind == "number"

    @property
    def neutral(self) -> Value:
        """A valid value, for use where the choice does not matter."""
        if self.depth in BENDS:
            return 1.0
        match self.parameter.kind:
            case "choice":
                return self.parameter.choices[0]
            case "flag":
                return False
        return min(max(0.0, self.parameter.low), self.parameter.high)


def axis_of(knob: Knob, recipe: Recipe, roles: Roles, *, keep_template_weight: bool = False) -> Axis:
    """Find a knob in a recipe.

    keep_template_weight  keep the template's weight from the recipe; otherwise it is 1 minus all the others'

    raises RecipeError if the recipe has no such parameter or model, or the parameter does not accept such values.
    """
    row, name = METHODS[recipe.merge_method], knob.parameter
    parameters = {parameter.name: parameter for parameter in row.parameters}
    if name is None:
        name = next((name for name, one in parameters.items() if name == "weight" or one.between), None)
        if name is None:
            numbers = [name for name, parameter in parameters.items() if parameter.kind in ("number", "count")]
            hint = f"Vary {numbers[0]}" if numbers else "It has no parameter that could be varied"
            raise RecipeError(f"{row.name} has no weight, so the recipe has no free parameter. {hint}")
    if name not in parameters:
        hint = did_you_mean(name, parameters) if parameters else " It has no parameters."
        raise RecipeError(f"vary: {row.name} has no parameter '{name}'.{hint}")
    parameter, full = parameters[name], knob.name(name)
    if knob.model is not None and not parameter.each:
        raise RecipeError(f"vary: {name} is one value for all models, not that of models[{knob.model}]")
    count, model = len(recipe.models), knob.model
    if model is None and name == "weight":
        model = _second(count, roles)
    if model is not None and model >= count:
        raise RecipeError(f"vary: {full}: there is no models[{model}], the recipe has {count} model{'s' * (count > 1)}")
    rest = roles.template if name == "weight" and not keep_template_weight and model != roles.template else None
    if knob.depth is not None:
        _check_depth(knob, parameter, full, roles.layers)
    of_depth = tuple(map(float, range(1, roles.layers))) if knob.depth in BENDS and knob.span is None else ()
    values = knob.values or of_depth or (DEFAULT_WEIGHTS if name == "weight" and knob.span is None else ())
    if not values and knob.span is None and not knob.unread:
        raise RecipeError(f"vary {full}: say which values of it to try, such as 0, 0.5 and 1")
    _check_span(knob, parameter, full)
    checked = _checked(values, parameter, full)
    return Axis(
        full, parameter, checked, knob.span, model, rest, roles.idle, knob.scope, knob.depth, roles.layers
    )  # fmt: skip


def _check_depth(knob: Knob, parameter: Parameter, name: str, layers: int) -> None:
    """Raise RecipeError for what is no schedule."""
    if parameter.kind != "number":
        raise RecipeError(f"vary {name}: only a number can change from layer to layer")
    if knob.scope != (None, None):
        raise RecipeError(f"vary {name}: a schedule is over all layers, not some of them")
    if layers < 2:
        raise RecipeError(f"vary {name}: the recipe merges {layers} layers, over which nothing can change")
    if knob.depth in BENDS:
        if knob.span is not None:
            raise RecipeError(f"vary {name}: is a layer; list those to try, such as 4,8,12, or none for all")
        for value in knob.values:
            if isinstance(value, bool | str) or not (value == int(value) and 1 <= value < layers):
                raise RecipeError(f"vary {name}: {value} is no layer to change at; say some of 1 to {layers - 1}")


def _second(count: int, roles: Roles) -> int:
    """Index of the model whose weight is varied by default: the second, or the first beside a template."""
    own = [place for place in range(count) if place not in roles.idle]
    beside = [place for place in own if place != roles.template] if roles.template is not None else own[1:] or own
    return beside[0] if beside else 1


def _check_span(knob: Knob, parameter: Parameter, name: str) -> None:
    if knob.span is None:
        return
    if parameter.kind != "number":
        raise RecipeError(f"vary {name}: only a number is drawn from a range; {parameter.name} needs values")
    if knob.span[0] >= knob.span[1]:
        raise RecipeError(f"vary {name}: {knob.span[0]:g} to {knob.span[1]:g} is no range")


def _checked(values: Sequence[Value], parameter: Parameter, name: str) -> tuple[Value, ...]:
    """The values that the parameter accepts; numbers ascending, without duplicates."""
    known: Collection[Value] = (True, False) if parameter.kind == "flag" else parameter.choices
    if parameter.kind in ("flag", "choice"):
        for value in values:
            if not any(value is one or (isinstance(value, str) and value == one) for one in known):
                words = ", ".join(str(one).lower() if isinstance(one, bool) else str(one) for one in known)
                raise RecipeError(f"vary {name}: {parameter.name} cannot be '{value}'; it is one of {words}")
        return tuple(values)
    numbers = []
    for value in values:
        if isinstance(value, bool | str) or not math.isfinite(value):
            raise RecipeError(f"vary {name}: '{value}' is no number")
        if value in numbers:
            raise RecipeError(f"vary {name}: has {value:g} twice")
        numbers.append(float(value))
    return tuple(sorted(numbers))


def turn(recipe: Recipe, values: Mapping[Axis, Value]) -> Recipe:
    """Set each knob of a recipe to its value.

    The recipe's own overrides remain in effect; a knob that applies to some tensors sets the
    rest of them. Where two such knobs overlap, both are set.

    raises RecipeError if the other models' weights, which the template's compensates, are missing, and if it
    is undecidable whether two knobs overlap.
    """
    scoped = {axis: value for axis, value in values.items() if not axis.everywhere}
    turned = _turn_all(recipe, {axis: value for axis, value in values.items() if axis.everywhere})
    return replace(turned, overrides=(*recipe.overrides, *_overrides(turned, scoped)))


def _turn_all(recipe: Recipe, values: Mapping[Axis, Value]) -> Recipe:
    own: dict[int, dict[str, Any]] = {place: dict(model.parameters) for place, model in enumerate(recipe.models)}
    general = dict(recipe.parameters)
    for axis, value in _with_schedules(values, general, own).items():
        name = axis.parameter.name
        if axis.model is None:
            general[name] = value
            for parameters in own.values():
                parameters.pop(name, None)
        else:
            own[axis.model][name] = value
    for axis in values:
        if axis.template is not None:
            weights = [parameters.get("weight", general.get("weight")) for parameters in own.values()]
            own[axis.template]["weight"] = _complement(weights, axis)
    models = tuple(replace(model, parameters=own[place]) for place, model in enumerate(recipe.models))
    return replace(recipe, models=models, parameters=general)


def _with_schedules(
    values: Mapping[Axis, Value], general: Mapping[str, Any], own: Mapping[int, Mapping[str, Any]]
) -> dict[Axis, Any]:
    """The values, those of one schedule joined to its list under the first of its axes."""
    schedules: dict[tuple[str, int | None], dict[Axis, Value]] = {}
    for axis, value in values.items():
        if axis.depth is not None:
            schedules.setdefault((axis.parameter.name, axis.model), {})[axis] = value
    found: dict[Axis, Any] = {axis: value for axis, value in values.items() if axis.depth is None}
    for (name, model), axes in schedules.items():
        before = general.get(name) if model is None else own[model].get(name, general.get(name))
        varied = {str(axis.depth): value for axis, value in axes.items()}
        first = next(iter(axes))
        found[first] = schedule_at(varied, before, first.layers, first.name.partition("@")[0])
    return found


def _overrides(recipe: Recipe, values: Mapping[Axis, Value]) -> tuple[Override, ...]:
    """Overrides for knobs that apply to some tensors: intersections of scopes first, then each scope."""
    scopes = list(dict.fromkeys(axis.scope for axis in values))
    made = []
    for count in range(len(scopes), 0, -1):
        for some in combinations(scopes, count):
            where = _meeting(some)
            if where is not None:
                inside = {axis: value for axis, value in values.items() if axis.scope in some}
                made.append(_override(recipe, where, inside))
    return tuple(made)


def _meeting(scopes: Sequence[Scope]) -> Scope | None:
    """The intersection of several scopes, None if it is empty."""
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
            f"vary: '{globs[0]}' and '{globs[1]}' may have tensors in common. Say one of them by its layers"
        )
    return layers, globs[0] if globs else None


def _override(recipe: Recipe, where: Scope, values: Mapping[Axis, Value]) -> Override:
    parameters: dict[str, Any] = {}
    for axis, value in values.items():
        name = axis.parameter.name
        if axis.model is None:
            parameters[name] = value
        else:
            general = recipe.parameters.get(name)
            each = parameters.setdefault(name, [model.parameters.get(name, general) for model in recipe.models])
            each[axis.model] = value
            if where[0] is not None and any(isinstance(one, list) for one in each):
                raise RecipeError(f"vary {axis.name}: {name} of another model changes from layer to layer, which it "
                                  "would do within these layers alone. Say overrides with numbers")  # fmt: skip
    for axis in values:
        if axis.template is not None:
            parameters["weight"][axis.template] = _complement(parameters["weight"], axis)
    return Override(layers=where[0], match=where[1], parameters=parameters)


def _complement(weights: Sequence[Any], axis: Axis) -> float | list[float]:
    """The complement to 1 in decimal arithmetic: 0.7 for 0.3; of a schedule, of each of its numbers."""
    others = [weight for place, weight in enumerate(weights) if place != axis.template and place not in axis.idle]
    length = max((len(weight) for weight in others if isinstance(weight, list)), default=0)
    if length and (rows := numbers_over_depth(others, length)) is not None:
        return [float(1 - sum(Decimal(repr(one)) for one in column)) for column in zip(*rows, strict=True)]
    if any(not isinstance(weight, int | float) for weight in others):
        raise RecipeError(
            f"vary {axis.name}: the template's weight is 1 minus the others', and not every other model says its own. "
            "Say a weight for each in the recipe, or `keep_template_weight`"
        )
    return float(1 - sum(Decimal(repr(float(weight))) for weight in others))
