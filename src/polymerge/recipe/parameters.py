"""Parameters: read from a recipe, and resolved to one value per model for each method that is used."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from numbers import Real
from typing import Any, Final

from polymerge.errors import PolymergeError, RecipeError, did_you_mean
from polymerge.methods.table import ADAPTERS, METHODS, OPTIONAL, Method, Parameter
from polymerge.methods.weights import cancel

__all__ = ["MEANINGLESS", "UNREAD", "Setting", "read_parameters", "resolve", "unread_parameters"]

_SPELLINGS: Final[Mapping[str, str]] = {"lambda": "scale"}
MEANINGLESS: Final = frozenset({"int8_mask"})
"""mergekit parameters that are accepted and change nothing."""

UNREAD: Final = object()
"""What stands for a value that was refused where it was read: what would follow from that is no problem of its own."""


@dataclass(frozen=True)
class Setting:
    """A method with all of its parameters: what is said per model is a tuple in the models' order."""

    method: str
    parameters: Mapping[str, Any]

    @property
    def divides_by_nothing(self) -> bool:
        """Whether its weights are to be divided by their sum, and that is about 0."""
        weights = self.parameters.get("weight", ())
        return self.parameters.get("normalize") is True and bool(weights) and cancel(weights)

    def of(self, places: Sequence[int]) -> Setting:
        """The setting for some of the models: of what is said per model, the values for those."""
        return Setting(
            self.method,
            {
                name: tuple(value[place] for place in places) if isinstance(value, tuple) else value
                for name, value in self.parameters.items()
            },
        )


def read_parameters(
    value: object, where: str, problems: list[PolymergeError], *, lists: bool = False, judged: bool = True
) -> dict[str, Any]:
    """Parameters of a recipe with their names checked; values are judged by `resolve`, when their method is known.

    lists   whether a list (one value per model) may stand where one number is usual
    judged  whether a name that no method has is a problem: it is none where the method itself is not known
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        problems.append(RecipeError(f"{where}: is a mapping of names to values, got '{value}'"))
        return unread_parameters()
    known = _known()
    result: dict[str, Any] = {}
    meant: list[str] = []
    changing: list[str] = []
    for name, given in value.items():
        written, name = name, _SPELLINGS.get(name, name)
        if name in result:
            problems.append(RecipeError(f"{where}: {name} is said twice, the second time as '{written}'"))
        elif name not in known and name not in MEANINGLESS:
            if judged:
                problems.append(
                    RecipeError(f"{where}: no method has a parameter '{name}'.{did_you_mean(str(name), known)}")
                )
                meant += get_close_matches(str(name), known, n=1)
        elif isinstance(given, list | tuple) and not lists:
            changing.append(str(written))
            result[name] = UNREAD
        elif isinstance(given, Mapping) or (given is None and name not in OPTIONAL):
            problems.append(RecipeError(f"{where}: {name}: has to be one value, got {given}"))
            result[name] = UNREAD
        else:
            result[name] = _plain(given)
    if changing:
        problems.append(RecipeError(f"{where}: {', '.join(changing)}: values that change from layer to layer are not "
                                    "supported; give one number, and overrides for other layers"))  # fmt: skip
    return dict.fromkeys(meant, UNREAD) | result


def unread_parameters() -> dict[str, Any]:
    """Parameters of which nothing is known, since what should say them was refused."""
    return dict.fromkeys(_known(), UNREAD)


def _known() -> dict[str, None]:
    return dict.fromkeys(one.name for method in METHODS.values() for one in (*method.parameters, *ADAPTERS))


def _plain(given: Any) -> Any:
    """A value as YAML would have it: numbers of numpy and the like become Python's, tuples lists."""
    if isinstance(given, list | tuple):
        return [_plain(value) for value in given]
    if isinstance(given, Real) and not isinstance(given, bool | int | float):
        return float(given)
    return given


def resolve(
    method: str,
    layers_of_say: Sequence[tuple[str, Mapping[str, Any]]],
    per_model: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    problems: list[PolymergeError],
    more: Sequence[Parameter] = (),
    beside: Collection[str] = (),
    base: Collection[int] = (),
) -> Setting:
    """All parameters of a method, from what the recipe says of them, with defaults for the rest.

    layers_of_say  (where it is written, parameters), most general first: the recipe's own, then an override's. What
                   a model says of itself stands between them: it beats the recipe, an override beats it.
    per_model      each model's own parameters, in the models' order: of what can differ from model to model
    labels         each model's name for messages
    more           parameters that the method takes here beside its own
    beside         names of parameters that the recipe says for something else
    base           places of models that are base_model. For a method on deltas they weigh nothing, whatever they say,
                   since their delta is zero; slerp counts its t from them. Both are as in mergekit
    """
    row = METHODS[method]
    general, *special = layers_of_say
    values: dict[str, Any] = {}
    before = len(problems)
    passed_over = base if row.on == "deltas" else ()
    for parameter in (*row.parameters, *more):
        if parameter.each:
            values[parameter.name] = tuple(
                _of_base(parameter)
                if place in passed_over
                else _value(row, parameter, _say(parameter.name, place, general, per_model, special, labels), problems)
                for place in range(len(labels))
            )
        elif method == "slerp" and parameter.name == "t":
            values["t"] = _arc(row, parameter, general, per_model, special, labels, problems, base)
        else:
            values[parameter.name] = _value(row, parameter, _say_of_all(parameter.name, general, special), problems)
    setting = Setting(method, values)
    read = UNREAD not in [given.get("weight") for given in (general[1], *per_model)]
    if setting.divides_by_nothing and read and len(problems) == before:
        problems.append(
            RecipeError(f"{special[-1][0] if special else general[0]}: {method}: the weights add up to about 0 and "
                        "cannot be normalized. Say normalize: false, or other weights")
        )  # fmt: skip
    own = [] if special else [(f"models[{n}] '{labels[n]}'", given) for n, given in enumerate(per_model)]
    shared = {parameter.name for parameter in (*row.parameters, *more) if not parameter.each}
    for name in sorted(shared):
        if said := [where for where, given in own if given.get(name, UNREAD) is not UNREAD]:
            spellings = " or ".join([name, *(other for other, one in _SPELLINGS.items() if one == name)])
            problems.append(
                RecipeError(
                    f"{', '.join(said)}: {spellings} is one value for the whole merge, and mergekit does not read it "
                    "here. Say it in the recipe's own parameters, or leave it out"
                )
            )
    _unused(row, [layers_of_say[-1], *own], problems, {*beside, *(parameter.name for parameter in more)})
    return setting


def _say(
    name: str,
    place: int,
    general: tuple[str, Mapping[str, Any]],
    per_model: Sequence[Mapping[str, Any]],
    special: Sequence[tuple[str, Mapping[str, Any]]],
    labels: Sequence[str],
) -> tuple[str, Any] | None:
    """What the recipe says of a per-model parameter for the model at `place`, and where."""
    for where, given in reversed(special):
        if name in given:
            value = given[name]
            if isinstance(value, list):
                value = value[place] if len(value) == len(labels) else f"{len(value)} values for {len(labels)} models"
            return where, value
    if name in per_model[place]:
        return f"models[{place}] '{labels[place]}'", per_model[place][name]
    if name in general[1]:
        return general[0], general[1][name]
    return (f"models[{place}] '{labels[place]}'", None) if name == "weight" else None


def _say_of_all(
    name: str, general: tuple[str, Mapping[str, Any]], special: Sequence[tuple[str, Mapping[str, Any]]]
) -> tuple[str, Any] | None:
    """What the recipe says of a parameter that is one for all models, and where."""
    return next(((where, given[name]) for where, given in (*reversed(special), general) if name in given), None)


def _of_base(parameter: Parameter) -> float:
    """What stands for a per-model parameter of the base, whose delta is zero."""
    return float(parameter.default or 0.0)


def _value(row: Method, parameter: Parameter, said: tuple[str, Any] | None, problems: list[PolymergeError]) -> Any:
    if said is not None and said[1] is UNREAD:
        return parameter.default or 0.0
    if said is not None and said[1] is None and parameter.optional:
        return None
    if said is None or said[1] is None:
        if parameter.default is None and not parameter.optional:
            where = f"{said[0]}: " if said else ""
            problems.append(RecipeError(f"{where}{row.name} needs `{parameter.name}`, and the recipe does not say it"))
            return 0.0
        return parameter.default
    where, value = said
    # as numbers they stand in many of mergekit's recipes and cards
    flag = bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None
    if parameter.kind == "flag":
        if flag is not None:
            return flag
        problems.append(RecipeError(f"{where}: {parameter.name} is true or false, got '{value}'"))
        return parameter.default
    if parameter.kind == "choice":
        if flag is not None and parameter.name == "normalize":
            value = "weight" if flag else "none"  # as mergekit's recipes have it
        if value in parameter.choices:
            return value
        hint = did_you_mean(str(value), parameter.choices)
        problems.append(RecipeError(f"{where}: {parameter.name} of {row.name} cannot be '{value}'.{hint}"))
        return parameter.default
    if parameter.kind == "count":
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
        problems.append(RecipeError(f"{where}: {parameter.name} is a whole number from 1, got '{value}'"))
        return 1
    return _number(row, parameter, where, value, problems)


def _number(row: Method, parameter: Parameter, where: str, value: Any, problems: list[PolymergeError]) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # YAML reads 1e-3 as a text
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        problems.append(RecipeError(f"{where}: {parameter.name} is a number, got '{value}'"))
    elif not parameter.low <= number <= parameter.high:
        problems.append(
            RecipeError(
                f"{where}: {parameter.name} of {row.name} lies from {parameter.low:g} to {parameter.high:g}, "
                f"got {number:g}"
            )
        )
    else:
        return number
    return 0.0


def _arc(
    row: Method,
    parameter: Parameter,
    general: tuple[str, Mapping[str, Any]],
    per_model: Sequence[Mapping[str, Any]],
    special: Sequence[tuple[str, Mapping[str, Any]]],
    labels: Sequence[str],
    problems: list[PolymergeError],
    base: Collection[int],
) -> float:
    """The place on the arc from the first model to the second.

    `t` itself, which is counted from the base where that is one of the two; or the second model's share of the two
    weights, which are each model's own say wherever it stands.
    """
    if not any("weight" in given and "t" not in given for _, given in special):
        said = _say_of_all("t", general, special)
        if said is not None:
            t = float(_value(row, parameter, said, problems))
            return float(1 - Decimal(repr(t))) if 1 in base and 0 not in base else t
        if any("t" in given for given in per_model):
            return 0.0  # said of a model, which is a problem already
    weights = [_say("weight", place, general, per_model, special, labels) for place in range(len(labels))]
    given = [(where, value) for where, value in filter(None, weights) if value is not None]
    if any(value is UNREAD for _, value in given) or not labels:
        return 0.0
    if len(labels) == len(given) == 2:
        weight = Parameter("weight", "number", low=0.0)
        before = len(problems)
        first, second = (_number(row, weight, where, value, problems) for where, value in given)
        if first + second > 0:
            return second / (first + second)
        if len(problems) == before:
            problems.append(RecipeError("slerp: the two weights are both 0"))
        return 0.0
    problems.append(
        RecipeError("slerp needs `t` from 0 (base_model, or the first model) to 1, or a `weight` for each model")
    )
    return 0.0


def _unused(
    row: Method,
    said: Sequence[tuple[str, Mapping[str, Any]]],
    problems: list[PolymergeError],
    more: Collection[str],
) -> None:
    allowed = {parameter.name for parameter in row.parameters} | MEANINGLESS | set(more)
    adapters = {parameter.name for parameter in ADAPTERS} - allowed
    if row.name in ("slerp", "copy"):
        allowed.add("weight")
    if row.on == "nothing":
        return
    for where, given in said:
        for name in given:
            if given[name] is UNREAD:
                continue
            if name in adapters:
                problems.append(RecipeError(f"{where}: {name} is for adapters, and these models are checkpoints"))
            elif name not in allowed:
                problems.append(
                    RecipeError(f"{where}: {row.name} has no parameter '{name}'.{did_you_mean(name, allowed)}")
                )
