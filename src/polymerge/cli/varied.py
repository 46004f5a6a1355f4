"""Parse varied parameters: `weight[2]`, `density@layers:0-5=0:0.6:0.1`, `weight@depth=0:1:linear`, and folders."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING

from polymerge.errors import RecipeError, collecting, refuse
from polymerge.paths import exists, given_path

if TYPE_CHECKING:
    from polymerge.tuning.knobs import Knob, Value

__all__ = ["log_folders", "parse_knob", "parse_knobs", "parse_span", "parse_values"]

_MOST = 10_000
_SHAPES = {"linear": ("first", "last"), "knee": ("first", "last", "knee"), "step": ("first", "last", "step")}
"""What is varied of a schedule of each shape."""
_BENDS = ("@depth:knee", "@depth:step")


def parse_knobs(vary: Sequence[str], values: str | None) -> list[Knob]:
    """Parse a list of `NAME` or `NAME=VALUES`; invalid ones are refused.

    values  for names without values; without any NAME, for the default knob
    """
    from polymerge.tuning.knobs import Knob

    knobs = []
    for text in (one for said in vary or ("",) for one in _schedule(said)):
        name, equals, own = text.partition("=")
        said, where = (own, f"--vary {name}") if equals else (values, "--values")
        if not equals and name.endswith(_BENDS):
            said = None  # layers, which those of a weight are no values of
        knob = Knob()
        with collecting() as wrong:
            knob = parse_knob(name) if name else knob
            if equals and values is not None:
                refuse(RecipeError(f"--vary {text} says its values, and so does --values: say them once"))
            else:
                knob = _with_values(knob, said, where)
        knobs.append(replace(knob, unread=bool(wrong)))
    return knobs


def _schedule(text: str) -> list[str]:
    """The knobs of a schedule, `NAME@depth=VALUES:SHAPE`: the values of both ends, and the layer of a knee or step."""
    name, _, said = text.partition("=")
    if not name.endswith("@depth"):
        return [text]
    ends, _, shape = said.rpartition(":")
    if shape not in _SHAPES:
        refuse(RecipeError(f"--vary {text}: says no shape ({', '.join(_SHAPES)}); write {name}=0:1:linear"))
        return [f"{name}:first={said}"]
    return [f"{name}:{one}={ends}" if one in ("first", "last") else f"{name}:{one}" for one in _SHAPES[shape]]


def parse_knob(name: str) -> Knob:
    """Parse PARAMETER, PARAMETER[MODEL], PARAMETER@WHERE or both.

    WHERE is layers:FIRST-LAST of the text tower, a part (text, vision, projector, audio), a glob on canonical names, or
    depth:END of a schedule (first, last, knee, step). Layers that are no range are refused.
    """
    from polymerge.families.rules import PARTS
    from polymerge.tuning.knobs import Knob
    from polymerge.tuning.schedules import DEPTHS

    said = re.fullmatch(r"(\w+)(?:\[(\d+)\])?(?:@(.+))?", name)
    if said is None:
        return Knob(name)
    parameter, model, place = said[1], None if said[2] is None else int(said[2]), said[3]
    layers = None
    if place is not None and place.startswith("depth:"):
        end = next((one for one in DEPTHS if f"depth:{one}" == place), None)
        if end is None:
            known = ", ".join(f"depth:{one}" for one in DEPTHS)
            refuse(RecipeError(f"--vary: '{place}' is nothing of a schedule; write {known}"))
        return Knob(parameter, model=model, depth=end)
    if place is not None and place.startswith("layers:"):
        found = re.fullmatch(r"layers:(\d+)(?:-(\d+))?", place)
        if found is None or int(found[2] or found[1]) < int(found[1]):
            refuse(RecipeError(f"--vary: '{place}' is no range of layers; write layers:0-5"))
            return Knob(parameter, model=model)
        layers = (int(found[1]), int(found[2] or found[1]))
    part = place if place in PARTS else None
    match = place if layers is None and part is None else None
    return Knob(parameter, model=model, layers=layers, part=part, match=match)


def _with_values(knob: Knob, text: str | None, where: str) -> Knob:
    if text is None:
        return knob
    span = parse_span(text, where)
    return replace(knob, span=span) if span is not None else replace(knob, values=parse_values(text, where))


def parse_values(text: str, where: str = "--values") -> tuple[Value, ...]:
    """Parse `0:0.6:0.1` (first, last, step; the last is included), or a list such as `0,0.1,0.3` or `true,false`.

    The steps are counted in decimals, so that the third value of 0:1:0.1 is 0.2 and the plan that it gives is the one
    of a recipe that says 0.2.

    raises RecipeError for an invalid range, and for a list with duplicates or an empty item.
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
    values = [_value(part.strip(), where, text) for part in text.split(",")]
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise RecipeError(f"{where}: '{text}' has {twice[0]} twice")
    return tuple(values)


def parse_span(text: str, where: str) -> tuple[float, float] | None:
    """Parse `0:0.6`, a range without a step, for samplers that draw from it; None for other forms."""
    if text.count(":") != 1:
        return None
    low, high = (float(_number(part, where, text)) for part in text.split(":"))
    if low >= high:
        raise RecipeError(f"{where}: '{text}' is no range; write LOW:HIGH, such as 0:0.6")
    return low, high


def _value(word: str, where: str, text: str) -> Value:
    if word in ("true", "false"):
        return word == "true"
    if re.fullmatch(r"[A-Za-z][\w-]*", word) and word.lower() not in ("nan", "inf", "infinity"):
        return word  # of a choice; a number that is varied refuses it
    return float(_number(word, where, text))


def _number(part: str, where: str, text: str) -> Decimal:
    try:
        number = Decimal(part.strip())
    except InvalidOperation:
        number = Decimal("NaN")
    if not math.isfinite(float(number)):
        raise RecipeError(f"{where}: '{part.strip()}' in '{text}' is no number; write 0:0.6:0.1 or 0,0.1,0.3")
    return number


def log_folders(said: Sequence[str]) -> Path | dict[float, Path]:
    """The single directory of candidates, or each candidate's folder by value, from VALUE=DIR; raises RecipeError."""
    pairs = [text.partition("=") for text in said]
    if len(said) == 1 and (exists(said[0]) or not _is_value(pairs[0][0])):
        return given_path(said[0])
    folders: dict[float, Path] = {}
    with collecting():
        for text, (value, equals, folder) in zip(said, pairs, strict=True):
            if not equals or not _is_value(value):
                refuse(RecipeError(f"--from-logs: '{text}' is not VALUE=DIR; say one directory, or each folder so"))
            elif float(value) in folders:
                refuse(RecipeError(f"--from-logs: {float(value):g} is said twice"))
            else:
                folders[float(value)] = given_path(folder)
    return folders


def _is_value(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
