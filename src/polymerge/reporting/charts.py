"""Charts as data: what the page's script draws, with hover, and lists as a table for whoever cannot see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Chart", "bars", "heat", "lines", "measure"]

Chart = dict[str, Any]
Number = float | None


def lines(
    title: str,
    x: tuple[str, Sequence[Any]],
    y: str,
    series: Sequence[Mapping[str, Any]],
    *,
    about: str = "",
    marks: Sequence[Mapping[str, Any]] = (),
    zero: bool = True,
) -> Chart:
    """Curves over numbers or over names.

    x       what the axis is, and its values: numbers, or texts that stand in order
    y       what the other axis is
    series  name, values (null where there is none); low and high for a band around them
    marks   places on x (`at`) with a label: what was chosen
    zero    whether the y axis begins at 0
    """
    return {
        "kind": "lines", "title": title, "about": about, "x": {"label": x[0], "values": list(x[1])}, "y": y,
        "series": [dict(one) for one in series], "marks": [dict(one) for one in marks], "zero": zero,
    }  # fmt: skip


def heat(
    title: str,
    x: tuple[str, Sequence[Any]],
    y: tuple[str, Sequence[Any]],
    measures: Sequence[Mapping[str, Any]],
    *,
    about: str = "",
) -> Chart:
    """A heat map: a row for each y, a column for each x, and one or several measures to choose from."""
    return {
        "kind": "heat", "title": title, "about": about, "x": {"label": x[0], "values": list(x[1])},
        "y": {"label": y[0], "values": list(y[1])}, "measures": [dict(one) for one in measures],
    }  # fmt: skip


def measure(name: str, about: str, values: Sequence[Sequence[Number]], *, diverging: bool = False) -> Chart:
    """What a heat map's colour stands for; `diverging` where 0 is the middle and either side means something."""
    there = [value for row in values for value in row if value is not None]
    low, high = (min(there), max(there)) if there else (0.0, 0.0)
    if diverging:
        high = max(abs(low), abs(high))
        low = -high
    return {
        "name": name, "about": about, "diverging": diverging, "low": low, "high": high,
        "values": [list(row) for row in values],
    }  # fmt: skip


def bars(title: str, labels: Sequence[str], series: Sequence[Mapping[str, Any]], *, about: str = "") -> Chart:
    """Horizontal bars, a group for each label; `low` and `high` of a series are the ends of its intervals."""
    return {
        "kind": "bars", "title": title, "about": about, "labels": list(labels),
        "series": [dict(one) for one in series],
    }  # fmt: skip
