"""Schedules over depth: a parameter's value in each layer, from a few numbers that a search varies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, get_args

from polymerge.errors import RecipeError

__all__ = ["BENDS", "DEPTHS", "Depth", "numbers_over_depth", "schedule_at"]

Depth = Literal["first", "last", "knee", "step"]
"""What of a schedule is varied: its value in the first layer, in the last one, or the layer at which it bends."""

DEPTHS: Final[tuple[Depth, ...]] = get_args(Depth)
BENDS: Final = ("knee", "step")

_DIGITS: Final = 12
"""Decimals of a number between two others, so that a recipe can be read: 0.3 and not 0.30000000000000004."""


def schedule_at(varied: Mapping[str, Any], before: Any, depth: int, name: str) -> list[float]:
    """The list of a recipe for what a search varies of a schedule.

    linear, if no layer is varied: [first, last], a straight line from the first layer to the last
    knee    first up to that layer, then a straight line to last; a number for each layer
    step    first before that layer, last from it on; a number for each layer

    varied   by `Depth`; an end that is not varied is that of `before`
    before   the recipe's own value: a number, a list, or None
    depth    number of layers
    name     of the parameter, for messages

    raises RecipeError where an end is neither varied nor said by the recipe, or both bends are varied.
    """
    own = before if isinstance(before, list) else [before, before]
    first, last = (varied.get(end, own[place]) for end, place in (("first", 0), ("last", -1)))
    for end, value in (("first", first), ("last", last)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RecipeError(
                f"vary {name}: neither the recipe nor the search says the {end} value of it. Say a number in the "
                f"recipe, or vary {name}@depth:{end} as well"
            )
    bends = [bend for bend in BENDS if bend in varied]
    if not bends:
        return [float(first), float(last)]
    if len(bends) > 1:
        raise RecipeError(f"vary {name}: a schedule has a knee or a step, not both")
    at = int(varied[bends[0]])
    if bends[0] == "step":
        return [float(first)] * at + [float(last)] * (depth - at)
    steps = max(depth - 1 - at, 1)
    return [
        round(first + (last - first) * max(layer - at, 0) / steps, _DIGITS) if layer < depth - 1 else float(last)
        for layer in range(depth)
    ]


def numbers_over_depth(values: Sequence[Any], length: int) -> list[list[float]] | None:
    """Each value as a list of this length: a number everywhere, or a list as it is; None if one is neither."""
    found = []
    for value in values:
        if isinstance(value, list) and len(value) == length:
            found.append([float(one) for one in value])
        elif isinstance(value, int | float):
            found.append([float(value)] * length)
        else:
            return None
    return found
