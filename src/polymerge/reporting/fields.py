"""Look into JSON data that a run wrote: what is missing or of the wrong kind is noted, with file and place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from polymerge.errors import PolymergeError, RecipeError

__all__ = ["Fields", "kind_of", "not_finite"]

_KINDS = {list: "an array", str: "a text", int: "a number", float: "a number", bool: "a truth value", dict: "an object"}


def kind_of(value: object) -> str:
    """A JSON value's kind in words."""
    return _KINDS.get(type(value), "null")


class Fields:
    """One JSON object of a file.

    Each method reads one member and gives a harmless value of its type where the member is broken, after noting what is
    wrong; whoever reads on refuses at the end. A member that may be missing is asked for with `optional`.
    """

    def __init__(self, data: Mapping[str, Any], where: str, problems: list[PolymergeError]) -> None:
        self.data, self.where, self.problems = data, where, problems

    def wrong(self, name: str, wanted: str) -> None:
        """Note that a member is not what it has to be."""
        found = f"is {kind_of(self.data[name])}" if name in self.data else "is missing"
        self.problems.append(RecipeError(f"{self.where}: {name} {found}, not {wanted}. Write the file again."))

    def text(self, name: str) -> str:
        """A text."""
        return str(self._one(name, str, "a text", ""))

    def texts(self, name: str) -> list[str]:
        """A list of texts."""
        return self._list(name, str, "an array of texts")

    def number(self, name: str) -> float:
        """A number; whole ones stay whole."""
        value: float = self._one(name, (int, float), "a number", 0)
        return value

    def points(self, name: str) -> float:
        """A number of points; what lies below nine digits is left by subtracting floats and is taken off."""
        return round(self.number(name), 9)

    def count(self, name: str) -> int:
        """A whole number, not below 0."""
        value = self._one(name, int, "a whole number", 0)
        if value < 0:
            self.problems.append(RecipeError(f"{self.where}: {name} is {value}, not a number of things"))
        return int(value)

    def number_or_none(self, name: str) -> float | None:
        """A number, or null for none."""
        return None if self.missing(name) else self.number(name)

    def numbers(self, name: str, length: int | None = None) -> list[float]:
        """A list of numbers, of a length where that is known."""
        found: list[float] = self._list(name, (int, float), "an array of numbers")
        if length is not None and len(found) != length and self._holds(found, name):
            self.problems.append(RecipeError(f"{self.where}: {name} has {len(found)} numbers for {length}"))
            return [0.0] * length
        return found

    def ends(self, name: str) -> tuple[float | None, float | None]:
        """The two ends of an interval; null for none."""
        if self.missing(name):
            return None, None
        low, high = self.numbers(name, 2) or (0.0, 0.0)
        return low, high

    def values(self, name: str) -> list[Any]:
        """A list of anything."""
        return self._list(name, object, "an array")

    def object(self, name: str) -> Fields:
        """An object in it."""
        value = self._one(name, dict, "an object", {})
        return Fields(value, f"{self.where}: {name}", self.problems)

    def objects(self, name: str) -> Iterator[Fields]:
        """The objects of a list of them."""
        for place, value in enumerate(self._list(name, dict, "an array of objects")):
            yield Fields(value, f"{self.where}: {name}[{place}]", self.problems)

    def rows(self, name: str, columns: list[str]) -> Iterator[Fields]:
        """The rows of a table, each as an object by the names of its columns."""
        for place, row in enumerate(self._list(name, list, "an array of rows")):
            where = f"{self.where}: {name}[{place}]"
            if len(row) != len(columns):
                self.problems.append(RecipeError(f"{where} has {len(row)} cells for {len(columns)} columns"))
                return
            yield Fields(dict(zip(columns, row, strict=True)), where, self.problems)

    def missing(self, name: str) -> bool:
        """Whether there is nothing, or null."""
        return self.data.get(name) is None

    def _one(self, name: str, kinds: type | tuple[type, ...], wanted: str, instead: Any) -> Any:
        value = self.data.get(name)
        if not isinstance(value, kinds) or isinstance(value, bool):
            self.wrong(name, wanted)
            return instead
        return value

    def _list(self, name: str, kinds: Any, wanted: str) -> list[Any]:
        value = self.data.get(name)
        if not isinstance(value, list) or not all(isinstance(one, kinds) for one in value):
            self.wrong(name, wanted)
            return []
        if kinds is not object and any(isinstance(one, bool) for one in value):
            self.wrong(name, wanted)
            return []
        return value

    def _holds(self, found: list[Any], name: str) -> bool:
        return found == self.data.get(name)  # else it has been said already


def not_finite(value: Any, where: str = "") -> Iterator[str]:
    """Where in JSON data a number is NaN or infinite, which is no JSON and no result."""
    if isinstance(value, float) and not math.isfinite(value):
        yield where or "the file"
    elif isinstance(value, dict):
        for name, member in value.items():
            yield from not_finite(member, f"{where}.{name}" if where else name)
    elif isinstance(value, list):
        for place, member in enumerate(value):
            yield from not_finite(member, f"{where}[{place}]")
