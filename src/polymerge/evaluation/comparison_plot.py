"""Charts of a comparison, for the page and as pictures: every model's score on every task, and its gains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from polymerge.charts import Series, bar_chart, heat_map
from polymerge.evaluation.gains import Gain

if TYPE_CHECKING:
    import altair as alt

__all__ = ["comparison_charts"]

_FEW = 5  # models whose bars can still be told apart


def comparison_charts(
    names: Sequence[str], scores: Mapping[str, Sequence[float | None]], gains: Sequence[Gain], *, published: bool
) -> list[alt.LayerChart]:
    """Scores as bars, or as a heat map of many models, and bars of the gains over each model or mean of models.

    names   of the columns
    scores  by model, one for each column
    """
    score = "score as published" if published else "score"
    if len(scores) > _FEW:
        models = list(scores)
        charts = [heat_map("Scores", ("task", names), ("model", models), score, list(scores.values()))]
    else:
        series = {model: Series(values) for model, values in scores.items()}
        charts = [bar_chart("Scores", ("task", names), score, series)]
    for over in dict.fromkeys(gain.over for gain in gains):
        of_these = {(gain.model, gain.column): gain for gain in gains if gain.over == over}
        models = list(dict.fromkeys(model for model, _ in of_these))
        if len(models) > _FEW:
            continue
        series = {}
        for model in models:
            own = [of_these.get((model, name)) for name in names]
            value, low, high = ([getattr(one, end, None) for one in own] for end in ("value", "low", "high"))
            series[model] = Series(value, low, high)
        title = f"Gain over {over[0]}" if len(over) == 1 else f"Gain over the mean of {' and '.join(over)}"
        about = "95 % intervals of the paired bootstrap, where there are any"
        charts.append(bar_chart(title, ("task", names), "points", series, about=about))
    return charts
