"""Knockouts and ablations on the page: charts, and the share of each third of the layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from msgspec import Struct, to_builtins

from polymerge.analysis.knockout_plots import drop_curves, drop_maps, gain_charts, where
from polymerge.charts import figure
from polymerge.errors import refuse_if_any
from polymerge.reporting.records import Count, Ends, Number, Source

__all__ = ["THIRDS", "ablation_section", "knockout_section"]

THIRDS: Final = ("early", "middle", "late")

_DIGITS = 9  # of points; what lies below is left by subtracting floats


class Drop(Struct):
    """Points lost, with an interval."""

    drop: Number
    interval: Ends = None


class Cell(Struct, kw_only=True):
    """The drop without some layers of a module: of the model, of the original, and their difference."""

    task: str
    module: str
    layers: list[int]
    third: str
    model: Drop
    against: Drop | None = None
    difference: Drop | None = None


class Third(Struct):
    """The share of a third of the layers in the total drop."""

    cells: Count
    drop: Number
    share: Number | None = None
    share_interval: Ends = None


class Thirds(Struct, kw_only=True):
    """The total drop and its thirds."""

    drop: Number
    interval: Ends = None
    early: Third
    middle: Third
    late: Third


class Summary(Struct, kw_only=True):
    """The thirds for one task and module."""

    task: str
    module: str
    model: Thirds
    against: Thirds | None = None
    difference: Thirds | None = None


class Asked(Struct):
    """The number of prompts of a task."""

    prompts: Count


class Score(Struct):
    """The baseline: the score with all weights in place."""

    score: Number


class Knockout(Struct, kw_only=True):
    """The members of knockout.json that the page shows."""

    model: str
    against: str | None = None
    replace: str
    scorer: str
    depth: Count
    modules: list[str]
    resamples: Count
    seed: Number
    tasks: dict[str, Asked]
    baseline: dict[str, dict[str, Score]]
    cells: list[Cell]
    summary: list[Summary]


class Gain(Struct):
    """Points gained over the template, with an interval."""

    score: Number
    gain: Number
    interval: Ends = None


class Range(Struct):
    """A range of layers, and the gains of merging it alone."""

    name: str
    layers: list[int]
    tasks: dict[str, Gain]


class Ablation(Struct):
    """The members of ablation.json that the page shows."""

    template: str
    scorer: str
    depth: Count
    tasks: dict[str, Asked]
    baseline: dict[str, Score]
    ranges: list[Range]


def knockout_section(source: Source) -> dict[str, Any]:
    """The page's section on a knockout.

    raises RecipeError, or Refused for several problems.
    """
    record = source.read(Knockout)
    shown = ["model"] if record.against is None else ["model", "against", "difference"]
    refuse_if_any(map(source.wrong, _faults(record, shown)))
    return {
        "label": source.label,
        "file": str(source.file),
        "model": record.model,
        "against": record.against,
        "replace": record.replace,
        "scorer": record.scorer,
        "depth": record.depth,
        "seed": record.seed,
        "resamples": record.resamples,
        "level": 95,
        "prompts": {task: asked.prompts for task, asked in record.tasks.items()},
        "baseline": {who: {task: record.baseline[who][task].score for task in record.tasks} for who in shown[:2]},
        "summary": [_line(entry, who) for entry in record.summary for who in shown],
        "cells": [_cell(entry, shown) for entry in record.cells],
        "charts": [figure({"": chart}) for make in (drop_maps, drop_curves) for chart in make(to_builtins(record))],
    }


def _faults(record: Knockout, shown: Sequence[str]) -> Iterator[str]:
    found: dict[str, Sequence[Cell | Summary]] = {"cells": record.cells, "summary": record.summary}
    for name, entries in found.items():
        for place, entry in enumerate(entries):
            yield from (f"{name}[{place}].{who} is missing" for who in shown if getattr(entry, who) is None)
            if entry.task not in record.tasks or entry.module not in record.modules:
                yield f"{name}[{place}] is of {entry.task}, {entry.module}, which it does not list"
    for who in shown[:2]:
        known = record.baseline.get(who, {})
        yield from (f"baseline.{who}['{task}'] is missing" for task in record.tasks if task not in known)


def _cell(entry: Cell, shown: Sequence[str]) -> dict[str, Any]:
    cell = {"task": entry.task, "module": entry.module, "layers": where(entry.layers), "third": entry.third}
    return cell | {who: _drop(getattr(entry, who)) for who in shown}


def _line(entry: Summary, who: str) -> dict[str, Any]:
    own: Thirds = getattr(entry, who)
    line = {"task": entry.task, "module": entry.module, "who": who, **_drop(own)}
    for name in THIRDS:
        third: Third = getattr(own, name)
        low, high = third.share_interval or (None, None)
        line[name] = {
            "cells": third.cells, "drop": _points(third.drop), "share": third.share, "low": low, "high": high,
        }  # fmt: skip
    return line


def _drop(found: Drop | Thirds) -> dict[str, Any]:
    low, high = found.interval or (None, None)
    return {"drop": _points(found.drop), "low": low, "high": high}


def _points(value: Number) -> Number:
    return round(value, _DIGITS)


def ablation_section(source: Source) -> dict[str, Any]:
    """The page's section on an ablation.

    raises RecipeError, or Refused for several problems.
    """
    record = source.read(Ablation)
    wrong = [f"baseline['{task}'] is missing" for task in record.tasks if task not in record.baseline]
    for place, entry in enumerate(record.ranges):
        wrong += [f"ranges[{place}].tasks['{task}'] is missing" for task in record.tasks if task not in entry.tasks]
    refuse_if_any(map(source.wrong, wrong))
    return {
        "label": source.label,
        "file": str(source.file),
        "template": record.template,
        "scorer": record.scorer,
        "depth": record.depth,
        "prompts": {task: asked.prompts for task, asked in record.tasks.items()},
        "baseline": {task: record.baseline[task].score for task in record.tasks},
        "rows": [
            {"name": entry.name, "layers": where(entry.layers), "tasks": _gains(entry.tasks, record.tasks)}
            for entry in record.ranges
        ],
        "charts": [figure({"": chart}) for chart in gain_charts(to_builtins(record))],
    }


def _gains(found: Mapping[str, Gain], tasks: Mapping[str, Asked]) -> dict[str, Any]:
    gains = {}
    for task in tasks:
        low, high = found[task].interval or (None, None)
        gains[task] = {"score": found[task].score, "gain": _points(found[task].gain), "low": low, "high": high}
    return gains
