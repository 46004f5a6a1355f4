"""Charts of a comparison, for the page and as pictures: every model's score on every task, and its gains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from polymerge.charts import Series, bar_chart, draw, heat_map
from polymerge.evaluation.comparison import Comparison

if TYPE_CHECKING:
    import altair as alt

__all__ = ["comparison_charts", "draw_comparison"]

_FEW = 5  # models whose bars can still be told apart


def comparison_charts(compared: Comparison) -> list[alt.LayerChart]:
    """Scores as bars, or as a heat map of many models, and bars of the gains over each model or mean of models."""
    names = [column.name for column in compared.columns]
    scores = {model: [compared.scores[model, name] for name in names] for model in compared.models}
    score = "score as published" if compared.published else "score"
    if len(scores) > _FEW:
        models = list(scores)
        charts = [heat_map("Scores", ("task", names), ("model", models), score, list(scores.values()))]
    else:
        series = {model: Series(values) for model, values in scores.items()}
        charts = [bar_chart("Scores", ("task", names), score, series)]
    for over in dict.fromkeys(gain.over for gain in compared.gains):
        gains = {(gain.model, gain.column): gain for gain in compared.gains if gain.over == over}
        models = list(dict.fromkeys(model for model, _ in gains))
        if len(models) > _FEW:
            continue
        series = {}
        for model in models:
            own = [gains.get((model, name)) for name in names]
            value, low, high = ([getattr(one, end, None) for one in own] for end in ("value", "low", "high"))
            series[model] = Series(value, low, high)
        title = f"Gain over {over[0]}" if len(over) == 1 else f"Gain over the mean of {' and '.join(over)}"
        about = "95 % intervals of the paired bootstrap, where there are any"
        charts.append(bar_chart(title, ("task", names), "points", series, about=about))
    return charts


def draw_comparison(compared: Comparison, stem: Path) -> tuple[Path, ...]:
    """Draw a comparison as STEM.png and STEM.svg; returns the files."""
    return draw(lambda: comparison_charts(compared), stem)
