"""Derive the plan of a recipe that differs from another only in parameters, without looking at the models."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import Context
from dataclasses import replace

from polymerge.errors import PolymergeError
from polymerge.methods.table import METHODS
from polymerge.planning.inputs import labels_of
from polymerge.planning.plan import Plan
from polymerge.planning.unused import drops_at_random, measures_tensors
from polymerge.recipe.overrides import Choice, choices_of, key_of, rest_of, settings_of
from polymerge.recipe.recipe import Recipe, recipe_dict
from polymerge.recipe.stages import sources_of

__all__ = ["varied"]


def varied(plan: Plan, before: Recipe, recipe: Recipe) -> Plan | None:
    """The plan that `make_plan` would make of `recipe`, derived from the plan of `before`; None if it must be planned
    anew.

    The plans of a coefficient sweep differ only in their settings, unless something
    other than parameters differs, a value is refused or changes by depth, or a shared setting becomes two.
    """
    if plan.of_adapters or len(plan.models) != len(recipe.models):
        return None
    if _without_parameters(before) != _without_parameters(recipe):
        return None
    base = _base(plan, recipe)
    methods = {recipe.merge_method, *(one.merge_method for one in recipe.overrides if one.merge_method)}
    if any(METHODS[method].models for method in methods) and recipe.base_model is not None and not base:
        return None  # it may be one of the two by another name
    try:  # in a context of its own, in which what is wrong is raised and not gathered: `make_plan` will say it
        was, now = (Context().run(_choices, one, base) for one in (before, recipe))
    except PolymergeError:
        return None
    if any(choice.schedule is not None for choice in now):
        return None
    if _pattern(was, len(plan.models)) != _pattern(now, len(plan.models)):
        return None
    settings = settings_of(now, len(plan.models))
    return replace(plan, recipe=recipe_dict(recipe), settings=tuple(settings.values()))


def _base(plan: Plan, recipe: Recipe) -> list[int]:
    """Indices of the models that are base_model: from the plan's base, or by name if it reads none."""
    if plan.base is not None:
        return [place for place, model in enumerate(plan.models) if model == plan.base]
    return [place for place, entry in enumerate(recipe.models) if entry.model == recipe.base_model]


def _choices(recipe: Recipe, base: Sequence[int]) -> list[Choice]:
    named = labels_of(sources_of(recipe))
    labels = [named[entry.model] for entry in recipe.models]
    return [one for one in choices_of(recipe, labels, recipe.models, base) if not one.setting.row.copies]


def _pattern(choices: Sequence[Choice], models: int) -> list[tuple[object, ...]]:
    """Which choices share a setting, their methods, their scopes, and the notes that they cause."""
    keys = list(settings_of(choices, models))
    noted = [(drops_at_random(one.setting), measures_tensors(one.setting)) for one in choices]
    rests = [rest_of(one.setting, models) if one.setting.whole else one.setting for one in choices]
    return [
        (keys.index(one.key), keys.index(key_of(rest)), one.setting.method, one.layers, one.match, note)
        for one, rest, note in zip(choices, rests, noted, strict=True)
    ]


def _without_parameters(recipe: Recipe) -> Recipe:
    return replace(
        recipe,
        models=tuple(replace(entry, parameters={}) for entry in recipe.models),
        overrides=tuple(replace(override, parameters={}) for override in recipe.overrides),
        parameters={},
    )
