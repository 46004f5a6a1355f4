"""Values that change from layer to layer: mergekit's gradients and filters, read and evaluated.

A value of a recipe is a single one; a gradient, which is a list of numbers that lie evenly from the first layer to the
last; or a list of conditions, each with a value or a gradient and perhaps a `filter`, of which the first that holds for
a tensor counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Final

from polymerge.errors import did_you_mean, shown

__all__ = [
    "NOTHING",
    "Position",
    "changes",
    "filters_in",
    "first_value",
    "is_by_model",
    "leaves",
    "plain_value",
    "unfit",
    "values_at",
]

NOTHING: Final = object()
"""The value of conditions none of which holds: what is said more generally counts then, or the default."""

_SAME: Final = 1e-9
"""Places in a gradient that are no further apart are one, but for rounding."""

_ALWAYS: Final = (None, "*")
"""Filters that hold for every tensor."""


@dataclass(frozen=True)
class Position:
    """What the value for a tensor depends on.

    share  its layer's place from the first, 0, to the last, 1; 0 outside of the layers
    name   as the template stores it, which filters are parts of
    """

    share: float
    name: str

    @classmethod
    def of(cls, layer: int | None, span: tuple[int, int], name: str) -> Position:
        """The position of a tensor of some layer in a span of layers, first and last; as in mergekit, a single layer is
        the last one.
        """
        if layer is None:
            return cls(0.0, name)
        steps = span[1] - span[0]
        return cls(min(max((layer - span[0]) / steps, 0.0), 1.0) if steps > 0 else 1.0, name)


def changes(value: object) -> bool:
    """Return whether a value is a gradient, conditions, or, in an override, a list of one value per model."""
    return isinstance(value, list)


def is_by_model(value: Any) -> bool:
    """Return whether a value is a list of other things than conditions."""
    return isinstance(value, list) and not (value and isinstance(value[0], Mapping))


def plain_value(given: Any) -> Any:
    """Convert a value to what YAML would give: numpy numbers become Python's, tuples lists, one condition a list."""
    if isinstance(given, Mapping):
        return [{name: plain_value(value) for name, value in given.items()}]
    if isinstance(given, list | tuple):
        return [plain_value(one)[0] if isinstance(one, Mapping) else plain_value(one) for one in given]
    if isinstance(given, Real) and not isinstance(given, bool | int | float):
        return float(given)
    return given


def unfit(value: Any, *, by_model: bool = False) -> str:
    """Why a list is neither a gradient nor conditions; empty if it is one.

    by_model  whether it may be a list of one value per model
    """
    if not value:
        return "" if by_model else "is an empty list"
    conditions = [one for one in value if isinstance(one, Mapping)]
    if conditions:
        if len(conditions) < len(value):
            return "mixes plain values and conditions (`- filter: mlp` with `value: 0.5`)"
        return next(filter(None, map(_unfit_condition, conditions)), "")
    if by_model:
        return next((why for one in value if isinstance(one, list) and (why := unfit(one))), "")
    return next((f"has to be a list of numbers, got '{shown(one)}'" for one in value if _number(one) is None), "")


def _unfit_condition(condition: Mapping[str, Any]) -> str:
    known = ("filter", "value")
    if odd := [name for name in condition if name not in known]:
        return f"has an unknown field '{shown(odd[0])}' in a condition.{did_you_mean(str(odd[0]), known)}"
    value, part = condition.get("value"), condition.get("filter")
    if value is None:
        return "has a condition without value"
    if part is not None and (not isinstance(part, str) or not part):
        return f"has a filter that is no part of a tensor's name: '{shown(part)}'"
    if not isinstance(value, list):
        return ""
    if any(isinstance(one, Mapping) for one in value):
        return "has conditions inside a condition"
    return unfit(value)


def values_at(parameters: Mapping[str, Any], position: Position, each: Callable[[str], bool]) -> dict[str, Any]:
    """The parameters at a position, without those of which no condition holds.

    each  tells of a name whether a list of it has one value per model, as in overrides; each of those may change itself
    """
    found = {}
    for name, value in parameters.items():
        if is_by_model(value) and each(name):
            found[name] = [_value_at(one, position) for one in value]
        else:
            found[name] = _value_at(value, position)
    return {name: value for name, value in found.items() if value is not NOTHING}


def first_value(value: Any) -> Any:
    """A value as it is outside of the layers, whatever the name: of its first condition, the first number."""
    while isinstance(value, list) and value:
        value = value[0]["value"] if isinstance(value[0], Mapping) else value[0]
    return value


def leaves(value: Any) -> Iterator[Any]:
    """Every single value that a recipe sets in a value."""
    if isinstance(value, list):
        for one in value:
            yield from leaves(one["value"] if isinstance(one, Mapping) else one)
    else:
        yield value


def filters_in(value: Any) -> Iterator[str]:
    """The filters in a value, without those that always hold."""
    for one in value if isinstance(value, list) else ():
        if isinstance(one, list):
            yield from filters_in(one)
        elif isinstance(one, Mapping) and one.get("filter") not in _ALWAYS:
            yield one["filter"]


def _value_at(value: Any, position: Position) -> Any:
    if not isinstance(value, list):
        return value
    if not isinstance(value[0], Mapping):
        return _interpolated(value, position.share)
    for one in value:
        if one.get("filter") in _ALWAYS or one["filter"] in position.name:
            return _value_at(one["value"], position)
    return NOTHING


def _interpolated(values: list[Any], share: float) -> float:
    """The value of a gradient; between two numbers it changes linearly."""
    numbers = [_number(one) or 0.0 for one in values]
    place = share * (len(numbers) - 1)
    place = round(place) if abs(place - round(place)) < _SAME else place  # a number for each layer is that number
    before = int(place)
    after, beyond = min(before + 1, len(numbers) - 1), place - before
    return (1 - beyond) * numbers[before] + beyond * numbers[after]


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)  # YAML reads 1e-3 as a text
    except (OverflowError, TypeError, ValueError):
        return None
