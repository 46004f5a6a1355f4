"""Scores of all evaluated models side by side, as in `polymerge compare`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from polymerge.charts import figure
from polymerge.errors import collecting
from polymerge.evaluation.comparison import compare_files
from polymerge.evaluation.results import Results, read_results
from polymerge.reporting.records import Source

__all__ = ["scores_section"]


def scores_section(sources: Sequence[Source], merges: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compare all results files; gains are over the template and the models of the merges.

    merges  the sections of merges

    raises Refused with every problem of the files.
    """
    with collecting(needed=True):
        read = [found for one in sources if (found := read_results(one.file)) is not None]
    places = {found.name: str(found.model.get("source", "")) for found in read}
    parents, template = _lineage(places, merges)
    assumed = template is None and len(places) > 1
    if assumed:
        template = next(iter(places))
    compared = compare_files([one.file for one in sources], parents=parents, template=template)
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
        "charts": [figure({"": chart}) for chart in compared.charts()],
    }  # fmt: skip


def _lineage(places: Mapping[str, str], merges: Sequence[Mapping[str, Any]]) -> tuple[list[str], str | None]:
    """The evaluated models that a merge was made of, and the one that is its template."""
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
    known = {entry["source"], entry["pinned"], _resolved(entry["source"])}
    return place in known or _resolved(place) in known


def _resolved(place: str) -> str:
    """Where a path leads; a text that is no path is itself."""
    return place if "\0" in place else os.path.realpath(place)


def _asked(name: str, read: Sequence[Results]) -> dict[str, Any]:
    """Number of questions, unit and group of a task; an average has none of its own."""
    task = next((found.tasks[name] for found in read if name in found.tasks), None)
    if task is None:
        return {"questions": None, "unit": "%", "group": None}
    return {"questions": task.total, "unit": task.unit, "group": task.group}
