"""The demo's one picture: accuracy against the weight of the merged delta."""

from __future__ import annotations

from pathlib import Path
from typing import Any

GROUPS = (
    ("perception", "perception", "tab:green"),
    ("seen", "arithmetic, seen pairs", "tab:gray"),
    ("unseen", "arithmetic, unseen pairs", "tab:red"),
)
METHODS = (("task_arithmetic", "reasoning delta", "-"), ("random", "random delta", "--"))


def plot(results: dict[str, Any], file: Path) -> None:
    """Draw each group's accuracy with its standard error: solid for the reasoning delta, dashed for the random one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)  # draws to a file, needs no screen
    axes = figure.subplots()
    for group, label, colour in GROUPS:
        for method, delta, style in METHODS:
            rows = [row for row in results["rows"] if row["method"] in ("none", method)]
            axes.errorbar(
                [row["weight"] for row in rows],
                [100 * row[group]["value"] for row in rows],
                yerr=[100 * row[group]["error"] for row in rows],
                color=colour,
                linestyle=style,
                marker="." if style == "-" else "",
                capsize=3,
                label=f"{label}: {delta}",
            )
    axes.set_xlabel("weight of the delta added to the VLM's text tower")
    axes.set_ylabel("right answers about held-out pictures, %")
    axes.set_ylim(0, 102)
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", ncols=2, loc="outside lower center")
    figure.savefig(file, dpi=120)
