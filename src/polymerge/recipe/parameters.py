"""Parameters: read from a recipe, and resolved to one value per model for each method in use."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from difflib import get_close_matches
from typing import Any, Final, TypeAlias

from polymerge.errors import RecipeError, collecting, did_you_mean, refuse, shown
from polymerge.methods.method import Method, Parameter
from polymerge.methods.table import ADAPTERS, METHODS, MODIFIERS, SHARED
from polymerge.methods.weights import cancel
from polymerge.recipe.depth import NOTHING, plain_value, unfit

__all__ = [
    "MEANINGLESS",
    "UNREAD",
    "Layer",
    "Setting",
    "check_value",
    "read_parameters",
    "resolve",
    "unread_parameters",
    "without_effect",
    "written_setting",
]

_SPELLINGS: Final[Mapping[str, str]] = {"lambda": "scale"}
MEANINGLESS: Final = frozenset({"int8_mask"})
"""mergekit parameters that are accepted without effect."""

_IGNORED: Final = frozenset(
    ("alpha", "density", "eps", "epsilon", "filter_wise", "gamma", "max_iter", "normalize", "normalize_weights",
     "nuslerp_flatten", "nuslerp_row_wise", "r", "scale", "select_topk", "t", "tol", "weight")
)  # fmt: skip
"""mergekit parameters that it ignores beside methods that do not have them here."""

_WORDS: Final[Mapping[str, bool]] = {"true": True, "false": False}
"""Flags as texts, which some recipes of mergekit's have."""

UNREAD: Final = object()
"""Placeholder for a refused value, which suppresses follow-up errors."""


@dataclass(frozen=True)
class Setting:
    """A method with all of its parameters; a per-model parameter is a tuple in the models' order."""

    method: str
    parameters: Mapping[str, Any]
    on_base: bool = field(default=False, compare=False)
    """Whether the recipe has a base_model, for methods that then work on deltas."""
    schedule: str = ""
    """Where the recipe has the schedule that it belongs to, if what it measures of whole models is measured over all of
    that; empty if it is measured over what has this setting.
    """

    @property
    def on_deltas(self) -> bool:
        """Whether it merges deltas from the base rather than weights."""
        return self.row.needs_base or (self.row.takes_base and self.on_base)

    @property
    def calibration(self) -> float | None:
        """The parameter of `calibrate: svc`; None where the merged delta is left as it is."""
        if self.parameters.get("calibrate") is None:
            return None
        return 1.0 if self.row.parameter("alpha") else float(self.parameters["alpha"])

    @property
    def whole(self) -> bool:
        """Whether it needs whole matrices."""
        return self.row.on == "matrices" or self.calibration is not None

    @property
    def by_row(self) -> bool:
        """Whether rows are compared one by one, so that blocks have to be whole rows."""
        flag = self.row.by_row
        return flag if isinstance(flag, bool) else self.parameters.get(flag[0]) is flag[1]

    @property
    def row(self) -> Method:
        """The method's row of the table."""
        return METHODS[self.method]

    @property
    def arguments(self) -> dict[str, Any]:
        """The parameters that its method's function is given by name: all but those that others handle."""
        others = SHARED | {one.name for one in (*MODIFIERS, *ADAPTERS) if not self.row.parameter(one.name)}
        return {name: value for name, value in self.parameters.items() if name not in others}

    @property
    def joins_factors(self) -> bool:
        """Whether adapters' A and B are merged separately, so that every adapter's B is multiplied with every
        adapter's A.
        """
        return "factors" in (self.parameters.get("compose"), self.parameters.get("space"))

    @property
    def divides_by_nothing(self) -> bool:
        """Whether its weights are to be normalised although their sum is about 0."""
        weights = self.parameters.get("weight", ())
        divides = any(self.parameters.get(name) is True for name in ("normalize", "normalize_weights"))
        return divides and bool(weights) and cancel(weights)

    def of(self, places: Sequence[int]) -> Setting:
        """The setting restricted to some models, by index: per-model parameters keep only their values."""
        return Setting(
            self.method,
            {
                name: tuple(value[place] for place in places) if isinstance(value, tuple) else value
                for name, value in self.parameters.items()
            },
            self.on_base,
            self.schedule,
        )


def read_parameters(value: object, where: str, *, lists: bool = False, judged: bool = True) -> dict[str, Any]:
    """Read the parameters of a recipe and check their names; values are checked by `resolve`, once the method is known.

    lists   whether a list of numbers may be one value per model, as in overrides
    judged  whether to refuse unknown names; false if the method itself is unknown
    returns the values by name, `UNREAD` for refused ones; those that change by depth as lists (see `recipe.depth`)
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        refuse(RecipeError(f"{where}: has to be a mapping of names to values, got '{shown(value)}'"))
        return unread_parameters()
    known = _known()
    result: dict[str, Any] = {}
    meant: list[str] = []
    for written, given in value.items():
        name = _SPELLINGS.get(written, written)
        if name in result:
            refuse(RecipeError(f"{where}: {name} is set twice, the second time as '{written}'"))
        elif name not in known and name not in MEANINGLESS:
            if judged:
                refuse(
                    RecipeError(f"{where}: no method has a parameter '{shown(name)}'.{did_you_mean(str(name), known)}")
                )
                meant += get_close_matches(str(name), known, n=1)
        elif given is None and not (name in known and known[name].optional):
            refuse(RecipeError(f"{where}: {name}: has to be a single value, got {given}"))
            result[name] = UNREAD
        else:
            result[name] = plain_value(given)
            if isinstance(result[name], list) and (why := unfit(result[name], by_model=lists)):
                refuse(RecipeError(f"{where}: {name}: {why}"))
                result[name] = UNREAD
    return dict.fromkeys(meant, UNREAD) | result


def unread_parameters() -> dict[str, Any]:
    """Every parameter as `UNREAD`, for parameters that were refused as a block."""
    return dict.fromkeys(_known(), UNREAD)


def _known() -> dict[str, Parameter]:
    """The parameters of all methods by name; among namesakes, one that may be null takes precedence."""
    every = [one for method in METHODS.values() for one in (*method.parameters, *ADAPTERS, *MODIFIERS)]
    return {one.name: one for one in sorted(every, key=lambda one: one.optional)}


Layer: TypeAlias = tuple[str, Mapping[str, Any]]
"""The location of parameters in a recipe, and the parameters."""


@dataclass(frozen=True)
class _Said:
    """The values given for one setting: a model's take precedence over the recipe's, an override's over both."""

    recipe: Layer
    overrides: Sequence[Layer]
    models: Sequence[Layer]

    def of_all(self, name: str) -> tuple[str, Any] | None:
        """The value of a parameter shared by all models, and where it is set."""
        layers = (*reversed(self.overrides), self.recipe)
        return next(((where, given[name]) for where, given in layers if name in given), None)

    def of_model(self, name: str, place: int) -> tuple[str, Any] | None:
        """The value of a per-model parameter for the model at index `place`, and where it is set."""
        count = len(self.models)
        for where, given in reversed(self.overrides):
            if name in given:
                value = given[name]
                if isinstance(value, list):
                    value = value[place] if len(value) == count else f"{len(value)} values for {count} models"
                if value is not NOTHING:
                    return where, value
        own, given = self.models[place]
        if name in given:
            return own, given[name]
        if name in self.recipe[1]:
            return self.recipe[0], self.recipe[1][name]
        return (own, None) if name == "weight" else None


def resolve(
    method: str,
    layers: Sequence[Layer],
    per_model: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    more: Sequence[Parameter] = (),
    beside: Collection[str] = (),
    base: Collection[int] = (),
    on_base: bool = False,
) -> Setting:
    """Resolve all parameters of a method from the recipe, with defaults for the others.

    layers     (location, parameters): the recipe's own, then an override's if there is one
    per_model  each model's own values, in the models' order, of parameters that may differ between models
    labels     each model's name for messages
    more       additional parameters that the method takes here
    beside     names of parameters that the recipe sets for another purpose
    base       indices of models that are base_model. For a method on deltas their weight is 0, whatever they set, since
               their delta is zero; slerp counts its t from them. Both are as in mergekit
    on_base    whether the recipe has a base_model
    refuses    values that are missing, of the wrong kind, out of range, unknown to the method, or misplaced
    """
    row = METHODS[method]
    models = [
        (f"models[{place}] '{label}'", given)
        for place, (label, given) in enumerate(zip(labels, per_model, strict=True))
    ]
    said = _Said(layers[0], layers[1:], models)
    on_deltas = Setting(method, {}, on_base).on_deltas
    asked = said.of_all("calibrate") if on_deltas else None
    if asked is not None:
        more = (*more, *(one for one in MODIFIERS if row.parameter(one.name) is None))
    parameters = (*row.parameters, *more)
    no_delta = base if on_deltas else ()
    values: dict[str, Any] = {}
    with collecting() as found:
        for parameter in parameters:
            name = parameter.name
            if parameter.each:
                values[name] = tuple(
                    float(parameter.default or 0.0)
                    if place in no_delta
                    else check_value(row, parameter, said.of_model(name, place))
                    for place in range(len(models))
                )
            elif parameter.between:
                values[name] = _between(row, parameter, said, base)
            else:
                values[name] = check_value(row, parameter, said.of_all(name))
    if asked is not None and values["calibrate"] is None:
        del values["calibrate"], values["alpha"]
    setting = Setting(method, values, on_base)
    if not found and row.refuses is not None and (problem := row.refuses(values)) is not None:
        refuse(RecipeError(f"{layers[-1][0]}: {method}: {problem}"))
    read = all(given.get("weight") is not UNREAD for given in (said.recipe[1], *per_model))
    if setting.divides_by_nothing and read and not found:
        refuse(RecipeError(f"{layers[-1][0]}: {method}: the weights add up to about 0 and cannot be normalized. Set "
                           "normalize: false, or other weights"))  # fmt: skip
    own = [] if said.overrides else models
    for name in sorted(parameter.name for parameter in parameters if not parameter.each):
        if places := [where for where, given in own if given.get(name, UNREAD) is not UNREAD]:
            spellings = " or ".join([name, *(other for other, one in _SPELLINGS.items() if one == name)])
            refuse(
                RecipeError(
                    f"{', '.join(places)}: {spellings} is a single value for the merge, which mergekit does not read "
                    "here. Set it in the recipe's own parameters, or remove it"
                )
            )
    _refuse_unused(
        row,
        [layers[-1], *own],
        {*beside, *(one.name for one in more)},
        quietly=not (said.overrides or more or row.only_here),
    )
    return setting


def without_effect(row: Method, given: Mapping[str, Any]) -> list[str]:
    """The parameters of a recipe or a model that its method does not have, and which mergekit ignores, too."""
    own = {parameter.name for parameter in row.parameters} | ({"weight"} if row.interpolates else set())
    return [name for name in given if name not in own and name in _IGNORED]


def written_setting(method: str, parameters: Mapping[str, Any], where: str) -> Setting:
    """A setting from plain data, with lists for the tuples; refuses what `resolve` would not have made.

    where  its place, for messages
    """
    if method not in METHODS or METHODS[method].copies:
        raise RecipeError(f"{where}: there is no method '{method}' that merges. Plan again")
    row = METHODS[method]
    known = {parameter.name: parameter for parameter in (*ADAPTERS, *MODIFIERS, *row.parameters)}
    if odd := [*(parameters.keys() - known.keys()), *({one.name for one in row.parameters} - parameters.keys())]:
        raise RecipeError(f"{where}: {method} has other parameters ({', '.join(sorted(map(str, odd)))}). Plan again")
    values: dict[str, Any] = {}
    with collecting(needed=True):
        for name, value in parameters.items():
            if known[name].each != isinstance(value, list | tuple):
                refuse(RecipeError(f"{where}: {name} of {method} cannot be {value}. Plan again"))
            elif known[name].each:
                values[name] = tuple(check_value(row, known[name], (where, one)) for one in value)
            else:
                values[name] = check_value(row, known[name], (where, value))
    if row.refuses is not None and (problem := row.refuses(values)) is not None:
        raise RecipeError(f"{where}: {method}: {problem}, and plan again")
    return Setting(method, values)


def check_value(row: Method, parameter: Parameter, said: tuple[str, Any] | None) -> Any:
    """Check a value's kind and range; a refused value is replaced by the default or any other."""
    if said is not None and said[1] is UNREAD:
        return parameter.default or 0.0
    if said is not None and said[1] is None and parameter.optional:
        return None
    if said is None or said[1] is None:
        if parameter.default is None and not parameter.optional:
            where = f"{said[0]}: " if said else ""
            refuse(RecipeError(f"{where}{row.name} needs `{parameter.name}`, which the recipe does not set"))
            return 0.0
        return parameter.default
    where, value = said
    # numbers stand for flags in many of mergekit's recipes and cards
    flag = bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else _WORDS.get(str(value).lower())
    match parameter.kind:
        case "flag":
            if flag is not None:
                return flag
            refuse(RecipeError(f"{where}: {parameter.name} has to be true or false, got '{shown(value)}'"))
            return parameter.default
        case "choice":
            if flag is not None and parameter.name == "normalize":
                value = "weight" if flag else "none"  # as mergekit's recipes have it
            if value in parameter.choices:
                return value
            hint = did_you_mean(str(value), parameter.choices)
            refuse(RecipeError(f"{where}: {parameter.name} of {row.name} cannot be '{shown(value)}'.{hint}"))
            return parameter.default
        case "count":
            if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
                return value
            refuse(RecipeError(f"{where}: {parameter.name} has to be an integer from 1, got '{shown(value)}'"))
            return 1
        case "number":
            return _number(row, parameter, where, value)


def _number(row: Method, parameter: Parameter, where: str, value: Any) -> float:
    name, low, high = parameter.name, parameter.low, parameter.high
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # YAML reads 1e-3 as a text
    except (OverflowError, TypeError, ValueError):
        number = math.nan
    if low <= number <= high and math.isfinite(number):
        return number
    if math.isfinite(number):
        refuse(RecipeError(f"{where}: {name} of {row.name} has to be from {low:g} to {high:g}, got {number:g}"))
    else:
        refuse(RecipeError(f"{where}: {name} has to be a number, got '{shown(value)}'"))
    return 0.0


def _between(row: Method, parameter: Parameter, said: _Said, base: Collection[int]) -> float:
    """The position between the first model and the second, from 0 to 1.

    The parameter itself, which is counted from the base if that is one of the two; or the second model's share of
    the two weights.
    """
    name = parameter.name
    if not any("weight" in given and name not in given for _, given in said.overrides):
        if (asked := said.of_all(name)) is not None:
            place = float(check_value(row, parameter, asked))
            return float(1 - Decimal(repr(place))) if 1 in base and 0 not in base else place
        if any(name in given for _, given in said.models):
            return 0.0  # said of a model, which is refused for itself
    weights = [said.of_model("weight", place) for place in range(len(said.models))]
    given = [(where, value) for where, value in filter(None, weights) if value is not None]
    if any(value is UNREAD for _, value in given) or not said.models:
        return 0.0
    if len(said.models) == len(given) == 2:
        weight = Parameter("weight", "number", low=0.0)
        with collecting() as found:
            first, second = (_number(row, weight, where, value) for where, value in given)
            if first + second > 0:
                return second / (first + second)
        if not found:
            refuse(RecipeError(f"{row.name}: the two weights are both 0"))
        return 0.0
    refuse(RecipeError(f"{row.name} needs `{name}` from 0 (base_model, or the first model) to 1, or a `weight` for "
                       "each model"))  # fmt: skip
    return 0.0


def _refuse_unused(row: Method, said: Sequence[Layer], more: Collection[str], *, quietly: bool) -> None:
    """Refuse parameters that the method does not have; `quietly` not those that mergekit ignores, which plans note."""
    if row.copies:
        return
    allowed = {parameter.name for parameter in row.parameters} | MEANINGLESS | set(more)
    adapters = {parameter.name for parameter in ADAPTERS} - allowed
    if row.interpolates:
        allowed.add("weight")
    for where, given in said:
        for name in given:
            if given[name] is UNREAD or name in allowed or (quietly and name in _IGNORED):
                continue
            if name in adapters:
                refuse(RecipeError(f"{where}: {name} is for adapters, and these models are checkpoints"))
            else:
                refuse(
                    RecipeError(f"{where}: {row.name} has no parameter '{shown(name)}'.{did_you_mean(name, allowed)}")
                )
