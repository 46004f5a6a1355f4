"""Weights that change with depth, found by search, beside one for all layers found in as many values as a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polymerge
from course import DEV, Course
from interview import GENERATION, Interview, prompt_file
from into_vlm import delta_recipe
from layers import WEIGHT
from sizes import Size

__all__ = ["CONSTANT", "OTHER_END", "schedules"]

CONSTANT = "one weight for all layers"
OTHER_END = "that line from its other end"


def schedules(course: Course, size: Size, folder: Path, work: Path) -> list[dict[str, Any]]:
    """Each way to find a schedule, on the same prompts, and how what it found does on others.

    The controls: one weight, searched in as many values as the schedules are; and the found line from its other end.
    """
    count = size.dev // len(DEV)
    file = prompt_file(course, dict.fromkeys(DEV, count), "dev", work / "dev")
    trials = len(size.ends) ** 2
    top = size.ends[-1]
    constant = tuple(round(top * place / (trials - 1), 4) for place in range(trials))
    line = _knobs("first", size.ends), _knobs("last", size.ends)
    bends = tuple(range(1, size.shape.layers, max(1, size.shape.layers // 4)))
    step = _knobs("first", size.ends[::2]), _knobs("last", size.ends[::2]), _knobs("step", bends)
    searches = {
        CONSTANT: [polymerge.Knob("weight", values=constant)],
        "a line from first to last": line,
        "two weights with a step": step,
    }
    rows, chosen = [], {}
    recipe = delta_recipe(folder, WEIGHT)
    for name, vary in searches.items():
        options = polymerge.SearchOptions(
            vary=vary, keep_template_weight=True, scoring=polymerge.Scoring("exact"), generation=GENERATION, force=True
        )
        found = polymerge.search(recipe, polymerge.PromptSource(file, samples=0), work / name, options)
        chosen[name] = found.recipe
        rows.append({"schedule": name, "trials": len(found.curve), "dev": max(found.outcome["scores"])})
        if name == "a line from first to last":
            chosen[OTHER_END] = _reversed(found.recipe)
            rows.append({"schedule": OTHER_END, "trials": 0})
    tasks = {group: prompt_file(course, {group: count}, "dev", work / "layers" / group) for group in DEV}
    map_of_layers = polymerge.layerwise(
        recipe, tasks, work / "map", scorer="exact", window=1, samples=0, generation=GENERATION, force=True
    )
    chosen["suggested by merging each layer alone"] = polymerge.suggest(map_of_layers)
    rows.append({"schedule": "suggested by merging each layer alone", "trials": size.shape.layers})
    with Interview(course, size, folder, recipe) as interview:
        for row in rows:
            found_recipe = chosen[row["schedule"]]
            interview.merge(found_recipe)
            row |= {"weight": _weight(found_recipe), "exam": interview.exam(DEV)}
        interview.merge(delta_recipe(folder, 0.0))
        rows.append({"schedule": "none", "trials": 0, "weight": 0.0, "exam": interview.exam(DEV)})
    return rows


def _knobs(depth: Any, values: Sequence[float]) -> polymerge.Knob:
    return polymerge.Knob("weight", values=tuple(map(float, values)), depth=depth)


def _weight(recipe: polymerge.Recipe) -> Any:
    """The weight of the language model, which is the second."""
    return recipe.models[1].parameters["weight"]


def _reversed(recipe: polymerge.Recipe) -> polymerge.Recipe:
    vlm, reason = recipe.models
    turned = replace(reason, parameters={**reason.parameters, "weight": list(reversed(_weight(recipe)))})
    return replace(recipe, models=(vlm, turned))
