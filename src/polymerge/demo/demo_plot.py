"""The demo's one picture: accuracy against the weight of the merged delta."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymerge.charts import Series, draw, line_chart

if TYPE_CHECKING:
    import altair as alt

GROUPS = (
    ("perception", "perception"),
    ("seen", "arithmetic, seen pairs"),
    ("unseen", "arithmetic, unseen pairs"),
)
METHODS = (("task_arithmetic", "reasoning delta"), ("random", "random delta"))


def plot(results: dict[str, Any], stem: Path) -> None:
    """Draw each group's accuracy, for the reasoning delta and for the random one, as STEM.png and STEM.svg."""
    draw(lambda: [_chart(results)], stem)


def _chart(results: dict[str, Any]) -> alt.LayerChart:
    rows = {(row["method"], row["weight"]): row for row in results["rows"]}
    weights = sorted({weight for _, weight in rows})
    series = {}
    for group, label in GROUPS:
        for method, delta in METHODS:
            own = [rows.get((method, weight), rows.get(("none", weight))) for weight in weights]
            value, error = (
                [None if row is None else 100.0 * row[group][name] for row in own] for name in ("value", "error")
            )
            pairs = list(zip(value, error, strict=True))
            low = [None if one is None or off is None else one - off for one, off in pairs]
            high = [None if one is None or off is None else one + off for one, off in pairs]
            series[f"{label}: {delta}"] = Series(value, low, high)
    return line_chart(
        "What the merged model answers", ("weight of the delta added to the VLM's text tower", weights),
        "right answers about held-out pictures, %", series, about="the shade is one standard error either way",
    )  # fmt: skip
