"""The values that a coefficient takes, as they are typed: a range, or a list."""

from __future__ import annotations

import math
from decimal import Decimal, InvalidOperation

from polymerge.errors import RecipeError

__all__ = ["parse_span", "parse_values"]

_MOST = 10_000


def parse_values(text: str, where: str = "--values") -> tuple[float, ...]:
    """Read `0:0.6:0.1` (first, last, step; the last is taken) or `0,0.1,0.3`; ascending, each once.

    The steps are counted in decimals, so that the third value of 0:1:0.1 is 0.2 and the plan that it gives is the one
    of a recipe that says 0.2.

    raises RecipeError for anything else.
    """
    if ":" in text:
        numbers = [_number(part, where, text) for part in text.split(":")]
        if len(numbers) != 3 or numbers[2] <= 0 or numbers[1] < numbers[0]:
            raise RecipeError(f"{where}: '{text}' is no range; write FIRST:LAST:STEP, such as 0:0.6:0.1")
        first, last, step = numbers
        if (last - first) / step >= _MOST:
            raise RecipeError(f"{where}: '{text}' are more than {_MOST} values; take a larger step")
        count = int((last - first) / step) + 1
        return tuple(float(first + place * step) for place in range(count))
    values = [float(_number(part, where, text)) for part in text.split(",")]
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise RecipeError(f"{where}: '{text}' has {twice[0]:g} twice")
    return tuple(sorted(values))


def parse_span(text: str, where: str) -> tuple[float, float] | None:
    """Read `0:0.6`, a range without a step, for samplers that draw from it; None where the text is something else."""
    if text.count(":") != 1:
        return None
    low, high = (float(_number(part, where, text)) for part in text.split(":"))
    if low >= high:
        raise RecipeError(f"{where}: '{text}' is no range; write LOW:HIGH, such as 0:0.6")
    return low, high


def _number(part: str, where: str, text: str) -> Decimal:
    try:
        number = Decimal(part.strip())
    except InvalidOperation:
        number = Decimal("NaN")
    if not math.isfinite(float(number)):
        raise RecipeError(f"{where}: '{part.strip()}' in '{text}' is no number; write 0:0.6:0.1 or 0,0.1,0.3")
    return number
