"""The picture of a search: differences between neighbours over the values, and scores where they are known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polymerge.errors import MissingExtraError

__all__ = ["draw_search"]

_DIFFERENCE, _SCORE = "#1f5fa8", "#c2571a"


def draw_search(outcome: Mapping[str, Any], stem: Path) -> tuple[Path, Path]:
    """Draw the outcome of a search over one parameter, as STEM.png and STEM.svg.

    outcome  what search.json holds

    raises MissingExtraError without matplotlib.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("the plot of a search needs matplotlib: pip install 'polymerge[search]'") from None
    with mpl.rc_context({"svg.hashsalt": "polymerge", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(outcome["vary"])
        if outcome.get("differences"):
            axes.plot(outcome["candidates"], outcome["differences"], "o-", color=_DIFFERENCE)
            unit = "distance" if outcome["compare"] == "embedding" else "prompts"
            axes.set_ylabel(f"difference to the neighbours ({unit})", color=_DIFFERENCE)
            axes.set_ylim(bottom=0)
        if outcome.get("scores"):
            beside = axes.twinx() if outcome.get("differences") else axes
            beside.spines[["top"]].set_visible(False)
            beside.plot(outcome["values"], outcome["scores"], "s--", color=_SCORE)
            beside.set_ylabel(f"score by labels ({outcome['scorer']}, %)", color=_SCORE)
        axes.axvline(outcome["chosen"], color="0.6", linewidth=1, linestyle=":")
        axes.set_title(f"chosen: {outcome['vary']} {outcome['chosen']:g}", loc="left")
        files = stem.with_suffix(".png"), stem.with_suffix(".svg")
        figure.savefig(files[0], dpi=150)
        figure.savefig(files[1], metadata={"Date": None})
    return files
