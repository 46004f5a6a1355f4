"""The tensor names of published checkpoints, with the first number of each name folded into a range."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from paths import GOLDEN

__all__ = ["DERIVED", "PUBLISHED", "names_of"]

PUBLISHED: list[dict[str, Any]] = json.loads((GOLDEN / "names.json").read_text(encoding="utf-8"))
"""Of checkpoints that a table explains, or nothing; the configs say what a table looks at, and some of them no more."""

DERIVED: list[dict[str, Any]] = json.loads((GOLDEN / "derived_names.json").read_text(encoding="utf-8"))
"""Of checkpoints that no table explains, with what their configs say of tensors."""

_EXPERTS = (128, 2, 2)
"""The shape of a tensor that holds all experts, for names without shapes: of it, the first is their number."""


def unfolded(name: str) -> Iterator[str]:
    """`layers.{0-1,5}.{w,b}` -> `layers.0.w`, `layers.0.b`, `layers.1.w`, and so on."""
    before, found, rest = name.partition("{")
    if not found:
        yield name
        return
    inside, _, after = rest.partition("}")
    for item in inside.split(","):
        first, span, last = item.partition("-")
        for one in range(int(first), int(last) + 1) if span else [item]:
            yield from (f"{before}{one}{tail}" for tail in unfolded(after))


def names_of(published: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every name, with what a table may look at of a shape."""
    names = [name for folded in published["names"] for name in unfolded(folded)]
    assert len(set(names)) == len(names)
    return dict.fromkeys(names, _EXPERTS)
