"""Scores of all evaluated models side by side, as `polymerge compare` sets them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polymerge.errors import PolymergeError, Refused, collecting
from polymerge.evaluation.comparison import Comparison, compare_files
from polymerge.evaluation.results import read_results
from polymerge.reporting.charts import Chart, bars, heat, measure
from polymerge.reporting.records import Source

__all__ = ["scores_section"]

_ABOUT = "95 % intervals of the paired bootstrap, where there are any"
_FEW = 5  # models whose bars can still be told apart


def scores_section(
    sources: Sequence[Source], merges: Sequence[Mapping[str, Any]], problems: list[PolymergeError]
) -> dict[str, Any] | None:
    """What results files say together; None where there are none, or where something is wrong with them.

    merges  the sections of merges, whose template and models are what gains are told over
    """
    if not sources:
        return None
    try:
        with collecting():
            read = [found for one in sources if (found := read_results(one.file)) is not None]
    except Refused as refused:
        problems += refused.problems
        return None
    places = {found.name: str(found.model.get("source", "")) for found in read}
    parents, template = _lineage(places, merges)
    assumed = template is None and len(places) > 1
    if assumed:
        template = next(iter(places))
    try:
        compared = compare_files([one.file for one in sources], parents=parents, template=template)
    except Refused as refused:
        problems += refused.problems
        return None
    return {
        "models": [
            {"name": name, "source": places[name], "tools": sorted({one.tool for one in read if one.name == name}),
             "files": [str(one.file) for one, its in zip(sources, read, strict=True) if its.name == name]}
            for name in compared.models
        ],
        "columns": [
            {"name": one.name, "average": one.is_average, **_asked(one.name, read)} for one in compared.columns
        ],
        "scores": [[compared.scores[model, column.name] for column in compared.columns] for model in compared.models],
        "parents": list(compared.parents),
        "template": compared.template,
        "assumed": assumed,
        "level": 95,
        "resamples": compared.settings["resamples"],
        "seed": compared.settings["seed"],
        "gains": [
            {
                "model": one.model, "column": one.column, "over": list(one.over), "gain": one.value, "low": one.low,
                "high": one.high, "reason": one.reason,
            }
            for one in compared.gains
        ],
        "notes": list(compared.notes),
        "charts": _charts(compared),
    }  # fmt: skip


def _lineage(places: Mapping[str, str], merges: Sequence[Mapping[str, Any]]) -> tuple[list[str], str | None]:
    """Which of the evaluated models a merge was made of, and which of them is its template."""
    parents: dict[str, None] = {}
    template = None
    for merge in merges:
        for entry in merge["inputs"]:
            named = [name for name, place in places.items() if place and _same(place, entry)]
            if any(role.startswith("models[") for role in entry["roles"]):
                parents |= dict.fromkeys(named)
            if "template" in entry["roles"] and named:
                template = template or named[0]
    return (list(parents) if len(parents) > 1 else []), template


def _same(place: str, entry: Mapping[str, Any]) -> bool:
    known = {entry["source"], entry["path"]} | {str(Path(one).resolve()) for one in (entry["path"],) if one}
    return place in known or str(Path(place).resolve()) in known


def _asked(name: str, read: Sequence[Any]) -> dict[str, Any]:
    """Of a task: how many questions, its unit and group; nothing of an average."""
    task = next((found.tasks[name] for found in read if name in found.tasks), None)
    if task is None:
        return {"questions": None, "unit": "%", "group": None}
    return {"questions": task.total, "unit": task.unit, "group": task.group}


def _charts(found: Comparison) -> list[Chart]:
    names = [column.name for column in found.columns]
    if len(found.models) > _FEW:
        values = [[found.scores[model, name] for name in names] for model in found.models]
        charts = [heat("Scores", ("task", names), ("model", list(found.models)), [measure("score", "", values)])]
    else:
        series = [{"name": model, "values": [found.scores[model, name] for name in names]} for model in found.models]
        charts = [bars("Scores", names, series)]
    for over in dict.fromkeys(gain.over for gain in found.gains):
        some = {(gain.model, gain.column): gain for gain in found.gains if gain.over == over}
        models = list(dict.fromkeys(model for model, _ in some))
        if len(models) > _FEW:
            continue
        series = []
        for model in models:
            own = [some.get((model, name)) for name in names]
            series.append(
                {
                    "name": model,
                    "values": [one.value if one else None for one in own],
                    "low": [one.low if one else None for one in own],
                    "high": [one.high if one else None for one in own],
                }
            )
        title = f"Gain over {over[0]}" if len(over) == 1 else f"Gain over the mean of {' and '.join(over)}"
        charts.append(bars(title, names, series, about=_ABOUT))
    return charts
