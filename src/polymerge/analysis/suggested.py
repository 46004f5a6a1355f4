"""The schedule over depth that a map of layers suggests, as a recipe.

It is a suggestion: drops and gains of single layers need not add up, and their prompts have been seen.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from polymerge.analysis.knockout import Knockout
from polymerge.analysis.layerwise import FULL, Layerwise
from polymerge.checkpoints.bounds import RECORDS_BYTES
from polymerge.checkpoints.json_objects import read_json
from polymerge.errors import RecipeError, collecting
from polymerge.methods.table import METHODS
from polymerge.planning import make_plan
from polymerge.recipe.parsing import as_recipe
from polymerge.recipe.recipe import ModelEntry, Override, Recipe, recipe_text

__all__ = ["refuse_unfit_for_schedules", "shares_of", "suggest", "suggestion_text"]

_DIGITS: Final = 4
"""Decimals of a share: more would say more than the scores do."""


def suggest(
    outcome: Knockout | Layerwise,
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe | None = None,
    *,
    keep: str | None = None,
) -> Recipe:
    """The recipe with the schedule that a knockout or a layer-wise merge suggests; it is planned before it is returned.

    In each layer every model but the template has its weight times the layer's share (`shares_of`). The template's
    weight makes up for it where the weights add up to 1. Where a method has no weights, layers with a share below 0.5
    are the template's.

    recipe  the merge; by default that of the layer-wise merge, or the one that made the model that was knocked out
    keep    of a knockout: the task for whose sake layers stay the template's; by default the first one

    raises RecipeError where it does not follow from the outcome, and Refused where the recipe cannot be planned.
    """
    if isinstance(outcome, Layerwise):
        read = as_recipe(outcome.settings["recipe"] if recipe is None else recipe)
    else:
        read = as_recipe(_recipe_of(outcome.model) if recipe is None else recipe)
    shares = shares_of(outcome, keep)
    made = _scheduled(read, shares)
    make_plan(made)
    return made


def refuse_unfit_for_schedules(
    recipe: Any, model: str = "", tasks: Sequence[str] = (), keep: str | None = None
) -> None:
    """Refuse, before anything is asked, what `suggest` could not use in the end.

    recipe  None for the one that made `model`
    tasks   of a knockout
    """
    with collecting():
        _scheduled(as_recipe(_recipe_of(model) if recipe is None else recipe), [1.0])
    if model:
        with collecting():
            _kept(tasks, keep)


def suggestion_text(made: Recipe, outcome: Knockout | Layerwise, keep: str | None = None) -> str:
    """The recipe as YAML, with the shares and their rule above it."""
    shares = ", ".join(f"{share:g}" for share in shares_of(outcome, keep))
    said = _RULES[type(outcome)].format(task=keep or next(iter(outcome.tasks), ""))
    return f"# suggested by {outcome.folder}: of the weights in each layer {shares}\n# {said}\n{recipe_text(made)}"


_RULES: Final = {
    Layerwise: "1 where merging the layer alone gains over the template, on average over tasks and ranges, else 0",
    Knockout: "2 r / (p + r), at most 1: p is the layer's share of what {task} loses, r that of the other tasks",
}


def shares_of(outcome: Knockout | Layerwise, keep: str | None = None) -> list[float]:
    """The share of its weight, in [0, 1], that a model has in each layer.

    Of a layer-wise merge: 1 where the ranges that hold a layer gain over the template on average, over tasks and
    ranges (`full` is none of them), else 0. Of a knockout: with p the layer's share of all drops of the task `keep`,
    and r the mean of its shares of the other tasks' drops, 2 r / (p + r), at most 1. So where the other tasks
    depend on a layer as much as `keep` does, or more, the weight is whole. Drops below 0 count as 0; those of `keep`
    are of the model before the merge if it was knocked out, too. Layers that were not measured have 1, and so have
    those on which nothing depends.

    raises RecipeError where there is no range but `full`, or no task beside `keep`.
    """
    return _by_gain(outcome) if isinstance(outcome, Layerwise) else _by_drop(outcome, keep)


def _by_gain(outcome: Layerwise) -> list[float]:
    gains: dict[int, list[float]] = defaultdict(list)
    for one in outcome.ranges:
        for layer in one.layers if one.name != FULL else ():
            gains[layer] += [score.gain for score in one.tasks.values()]
    if not gains:
        raise RecipeError("ranges: only the whole recipe was merged, which says nothing of single layers. Say others")
    return [float(sum(gains[layer]) > 0) if layer in gains else 1.0 for layer in range(outcome.depth)]


def _by_drop(outcome: Knockout, keep: str | None) -> list[float]:
    kept, others = _kept(list(outcome.tasks), keep)
    drops = {task: [0.0] * outcome.depth for task in outcome.tasks}
    measured: set[int] = set()
    for cell in outcome.cells:
        found = cell.against if cell.task == kept and cell.against is not None else cell.model
        measured |= set(cell.layers)
        for layer in cell.layers:
            drops[cell.task][layer] += max(found.drop, 0.0) / len(cell.layers)
    parts = {task: _parts(own) for task, own in drops.items()}
    shares = []
    for layer in range(outcome.depth):
        p, r = parts[kept][layer], sum(parts[task][layer] for task in others) / len(others)
        shares.append(round(min(2 * r / (p + r), 1.0), _DIGITS) if layer in measured and p + r else 1.0)
    return shares


def _kept(tasks: Sequence[str], keep: str | None) -> tuple[str, list[str]]:
    """The task for whose sake layers are kept, and the others."""
    kept = keep or tasks[0]
    if kept not in tasks:
        raise RecipeError(f"keep: there is no task '{kept}', there are {', '.join(tasks)}")
    others = [task for task in tasks if task != kept]
    if not others:
        raise RecipeError(
            f"prompts: '{kept}' is the only task. A schedule weighs what the template does well against what other "
            "models bring: ask the prompts of both"
        )
    return kept, others


def _parts(drops: Sequence[float]) -> list[float]:
    whole = sum(drops)
    return [drop / whole if whole else 0.0 for drop in drops]


def _recipe_of(model: str) -> Any:
    """The recipe in the record of a merged model."""
    file = Path(model) / "polymerge.json"
    if not file.is_file():
        raise RecipeError(f"{model}: has no polymerge.json with the recipe that made it. Say which one to schedule")
    return read_json(file, dict[str, Any], most=RECORDS_BYTES).get("recipe")


def _scheduled(recipe: Recipe, shares: Sequence[float]) -> Recipe:
    """The recipe with each weight but the template's times the shares of the layers."""
    row, plan = METHODS[recipe.merge_method], make_plan(recipe)
    places = dict(zip(plan.models, plan.places, strict=True))
    template = places.get(plan.template)
    own = [entry.parameters.get("weight", recipe.parameters.get("weight")) for entry in recipe.models]
    weighted = [place for place in places.values() if place != template]
    recipe = replace(recipe, layers=len(shares))
    if row.parameter("weight") is None and not (row.interpolates and any(one is not None for one in own)):
        return replace(recipe, overrides=(*_copies(shares), *recipe.overrides))
    for place in sorted(places.values()):
        if isinstance(own[place], bool) or not isinstance(own[place], int | float):
            raise RecipeError(
                f"models[{place}] '{recipe.models[place].model}': its weight is {own[place]!r}, and a schedule is of "
                "numbers. Say one in the recipe"
            )
    lists = {place: [round(own[place] * share, _DIGITS + 4) for share in shares] for place in weighted}
    if template is not None and abs(sum(own[place] for place in places.values()) - 1) < 1e-9:
        rest = [1 - sum(column) for column in zip(*lists.values(), strict=True)] if lists else []
        lists[template] = [round(one, _DIGITS + 4) for one in rest]
    models = tuple(
        replace(entry, parameters={**entry.parameters, "weight": lists[place]}) if place in lists else entry
        for place, entry in enumerate(recipe.models)
        if isinstance(entry, ModelEntry)
    )
    return replace(recipe, models=models)


def _copies(shares: Sequence[float]) -> tuple[Override, ...]:
    """Overrides that leave layers of small shares as the template has them."""
    runs: list[tuple[int, int]] = []
    for layer, share in enumerate(shares):
        if share < 0.5:
            if runs and runs[-1][1] == layer - 1:
                runs[-1] = (runs[-1][0], layer)
            else:
                runs.append((layer, layer))
    return tuple(Override(layers=run, merge_method="copy") for run in runs)
