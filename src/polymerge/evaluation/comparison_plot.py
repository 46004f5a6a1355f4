"""The picture of a comparison: every model's score at every task and average."""

from __future__ import annotations

from pathlib import Path

from polymerge.errors import MissingExtraError
from polymerge.evaluation.comparison import Comparison

__all__ = ["draw_comparison"]

_COLOURS = ("#1f5fa8", "#c2571a", "#3b8f4a", "#8a4fa3", "#b8a11f", "#5c5c5c", "#c04f7a", "#2a9d9d")
_MARKS = "osD^vPX*"


def draw_comparison(compared: Comparison, stem: Path) -> tuple[Path, Path]:
    """Draw a comparison as STEM.png and STEM.svg: a line for each task, averages below a rule.

    raises MissingExtraError without matplotlib.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("the plot of a comparison needs matplotlib: pip install 'polymerge[search]'") from None
    columns = [
        *(column for column in compared.columns if not column.is_average),
        *(column for column in compared.columns if column.is_average),
    ]
    with mpl.rc_context({"svg.hashsalt": "polymerge", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(7.2, 1.4 + 0.36 * len(columns)), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        for number, model in enumerate(compared.models):
            known = [
                (score, place)
                for place, column in enumerate(columns)
                if (score := compared.scores[model, column.name]) is not None
            ]
            axes.plot(
                [score for score, _ in known], [place for _, place in known], _MARKS[number % len(_MARKS)],
                color=_COLOURS[number % len(_COLOURS)], label=model.replace("$", r"\$"), markersize=6, alpha=0.85,
            )  # fmt: skip
        tasks = sum(not column.is_average for column in columns)
        if tasks < len(columns):
            axes.axhline(tasks - 0.5, color="0.6", linewidth=1)
        axes.set_yticks(range(len(columns)), [column.name.replace("$", r"\$") for column in columns])
        axes.set_ylim(len(columns) - 0.5, -0.5)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        axes.set_xlabel("score as published" if compared.published else "score")
        figure.legend(loc="outside upper center", ncols=3, frameon=False)
        files = stem.with_suffix(".png"), stem.with_suffix(".svg")
        figure.savefig(files[0], dpi=150)
        figure.savefig(files[1], metadata={"Date": None})
    return files
