"""Keep a page small enough to be mailed and opened on a phone: long tables are shortened, and say so."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

__all__ = ["MOST_BYTES", "shorter"]

MOST_BYTES: Final = 4_800_000
"""Of the data in a page, so that the page stays below 5 MB."""

_TENSORS = 300


def shorter(data: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The same report with shorter tables: first of overlaps the tensors with most conflict, then plans by kinds."""
    found = dict(data)
    found["overlaps"] = [{**one, "tensors": _worst(one)} for one in data["overlaps"]]
    yield found
    found = dict(found)
    found["merges"] = [{**one, "plan": _by_kind(one["plan"])} for one in data["merges"]]
    yield found


def _worst(overlap: Mapping[str, Any]) -> list[Any]:
    place = overlap["tensor_columns"].index("conflict_mass")
    return sorted(overlap["tensors"], key=lambda row: -(row[place] or 0))[:_TENSORS]


def _by_kind(plan: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Rows that differ in numbers of their names alone as one, with how many they are."""
    if plan is None:
        return None
    kinds: dict[str, list[Any]] = {}
    for name, canonical, fate, dtype, shape, settings, reason, count in plan["rows"]:
        row = [_pattern(name), _pattern(canonical), fate, dtype, shape, settings, reason, 0]
        kinds.setdefault(str(row), row)[-1] += count
    left_out = {str(row): row for row in ([label, _pattern(name), why] for label, name, why in plan["left_out"])}
    return {**plan, "rows": list(kinds.values()), "left_out": list(left_out.values()), "by_kind": True}


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "{i}", name)
