"""The demo's one picture: accuracy against the weight of the merged delta."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LINES = (
    ("perception", "perception", "tab:green"),
    ("seen", "arithmetic, seen pairs", "tab:gray"),
    ("unseen", "arithmetic, unseen pairs", "tab:red"),
)


def plot(results: dict[str, Any], file: Path) -> None:
    """Draw each group's accuracy with its standard error: solid for the reasoning delta, dashed for the random one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for group, label, colour in LINES:
        for method, style, of in (("task_arithmetic", "-", "reasoning delta"), ("random", "--", "random delta")):
            rows = [row for row in results["rows"] if row["method"] in ("none", method)]
            axes.errorbar(
                [row["weight"] for row in rows],
                [100 * row[group]["value"] for row in rows],
                yerr=[100 * row[group]["error"] for row in rows],
                color=colour,
                linestyle=style,
                marker="o" if style == "-" else None,
                capsize=3,
                label=f"{label}, {of}",
            )
    axes.set_xlabel("weight of the delta merged into the VLM's text tower")
    axes.set_ylabel("right answers on held-out pictures, %")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.savefig(file, dpi=120, metadata={"Software": "polymerge"})
