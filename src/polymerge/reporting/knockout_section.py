"""Knockouts and ablations as the page shows them: maps, curves, and in which third of the layers something is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from polymerge.errors import PolymergeError, RecipeError
from polymerge.planning.text_words import ranges
from polymerge.reporting.charts import Chart, bars, heat, lines, measure
from polymerge.reporting.fields import Fields
from polymerge.reporting.records import Source

__all__ = ["THIRDS", "ablation_section", "knockout_section"]

THIRDS: Final = ("early", "middle", "late")

_WHO: Final = {"model": "the model", "against": "the original", "difference": "model less original"}
_FEW = 4  # bars side by side that can still be told apart


def knockout_section(source: Source, problems: list[PolymergeError]) -> dict[str, Any]:
    """What knockout.json says, in the page's form; what is wrong with it is noted in `problems`."""
    data = Fields(source.data, str(source.file), problems)
    against = None if data.missing("against") else data.text("against")
    shown = ["model"] if against is None else list(_WHO)
    cells = [_cell(entry, shown) for entry in data.objects("cells")]
    tasks, modules = list(data.object("tasks").data), data.texts("modules")
    for entry in cells:
        if entry["task"] not in tasks or entry["module"] not in modules:
            problems.append(
                RecipeError(f"{source.file}: has a cell of {entry['task']}, {entry['module']}, which it does not list")
            )
    baseline = data.object("baseline")
    return {
        "label": source.label,
        "file": str(source.file),
        "model": data.text("model"),
        "against": against,
        "replace": data.text("replace"),
        "scorer": data.text("scorer"),
        "depth": data.count("depth"),
        "seed": data.number("seed"),
        "resamples": data.count("resamples"),
        "level": 95,
        "prompts": {task: data.object("tasks").object(task).count("prompts") for task in tasks},
        "baseline": {
            who: {task: baseline.object(who).object(task).number("score") for task in tasks}
            for who in shown
            if who != "difference"
        },
        "summary": [one for entry in data.objects("summary") for one in _summary(entry, shown)],
        "cells": cells,
        "charts": _charts(cells, tasks, modules, shown),
    }


def _cell(entry: Fields, shown: Sequence[str]) -> dict[str, Any]:
    layers = [int(layer) for layer in entry.numbers("layers")]
    cell: dict[str, Any] = {
        "task": entry.text("task"),
        "module": entry.text("module"),
        "layers": ranges(layers).replace(", ", ","),
        "third": entry.text("third"),
    }
    for who in shown:
        own = entry.object(who)
        low, high = own.ends("interval")
        cell[who] = {"drop": own.points("drop"), "low": low, "high": high}
    return cell


def _summary(entry: Fields, shown: Sequence[str]) -> list[dict[str, Any]]:
    told = []
    for who in shown:
        own = entry.object(who)
        low, high = own.ends("interval")
        line: dict[str, Any] = {
            "task": entry.text("task"), "module": entry.text("module"), "who": who, "drop": own.points("drop"),
            "low": low, "high": high,
        }  # fmt: skip
        for third in THIRDS:
            part = own.object(third)
            low, high = part.ends("share_interval")
            line[third] = {
                "cells": part.count("cells"), "drop": part.points("drop"), "share": part.number_or_none("share"),
                "low": low, "high": high,
            }  # fmt: skip
        told.append(line)
    return told


def _charts(
    cells: Sequence[Mapping[str, Any]], tasks: Sequence[str], modules: Sequence[str], shown: Sequence[str]
) -> list[Chart]:
    places = list(dict.fromkeys(cell["layers"] for cell in cells))
    if not places:
        return []
    found = {(cell["task"], cell["module"], cell["layers"]): cell for cell in cells}

    def drop(task: str, module: str, place: str, who: str, what: str = "drop") -> float | None:
        cell = found.get((task, module, place))
        value: float | None = None if cell is None else cell[who][what]
        return value

    rows = [(task, module) for task in tasks for module in modules]
    values = {who: [[drop(*row, place, who) for place in places] for row in rows] for who in shown}
    # one scale for all of the maps, so that a colour means the same in each
    top = max((abs(cell[who]["drop"]) for cell in cells for who in shown), default=0.0)
    names = [f"{task}, {module}" for task, module in rows]
    about = "points lost when these layers are knocked out; below 0 something is gained"
    charts = [
        heat(
            f"Drop by layer: {_WHO[who]}",
            ("layer", places),
            ("", names),
            [measure("drop", about, values[who], diverging=True) | {"low": -top, "high": top}],
        )
        for who in shown
    ]
    for task, module in rows:
        series = [
            {
                "name": _WHO[who],
                "values": [drop(task, module, place, who) for place in places],
                **{end: [drop(task, module, place, who, end) for place in places] for end in ("low", "high")},
            }
            for who in shown
            if who != "difference"
        ]
        about = "the shade holds 95 % of the resamples" if any(end is not None for end in series[0]["low"]) else ""
        title = f"Drop along the layers: {task}, {module}"
        charts.append(lines(title, ("layer", places), "points", series, about=about))
    return charts


def ablation_section(source: Source, problems: list[PolymergeError]) -> dict[str, Any]:
    """What ablation.json says, in the page's form; what is wrong with it is noted in `problems`."""
    data = Fields(source.data, str(source.file), problems)
    tasks = list(data.object("tasks").data)
    baseline = data.object("baseline")
    rows = []
    for entry in data.objects("ranges"):
        layers = [int(layer) for layer in entry.numbers("layers")]
        row: dict[str, Any] = {"name": entry.text("name"), "layers": ranges(layers).replace(", ", ","), "tasks": {}}
        for task in tasks:
            own = entry.object("tasks").object(task)
            low, high = own.ends("interval")
            row["tasks"][task] = {"score": own.number("score"), "gain": own.points("gain"), "low": low, "high": high}
        rows.append(row)
    return {
        "label": source.label,
        "file": str(source.file),
        "template": data.text("template"),
        "scorer": data.text("scorer"),
        "depth": data.count("depth"),
        "prompts": {task: data.object("tasks").object(task).count("prompts") for task in tasks},
        "baseline": {task: baseline.object(task).number("score") for task in tasks},
        "rows": rows,
        "charts": _gains(rows, tasks) if rows and tasks else [],
    }


def _gains(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[Chart]:
    names = [row["name"] if row["name"] == row["layers"] else f"{row['name']} ({row['layers']})" for row in rows]
    about = "points over the template, with 95 % of the resamples"
    if len(tasks) > _FEW:
        values = [[row["tasks"][task]["gain"] for row in rows] for task in tasks]
        gains = [measure("gain", about, values, diverging=True)]
        return [heat("Gain by the layers that are merged", ("layers", names), ("task", tasks), gains)]
    series = [
        {
            "name": task,
            "values": [row["tasks"][task]["gain"] for row in rows],
            **{end: [row["tasks"][task][end] for row in rows] for end in ("low", "high")},
        }
        for task in tasks
    ]
    return [bars("Gain by the layers that are merged", names, series, about=about)]
