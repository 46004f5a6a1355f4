"""Derive the plan of a recipe that differs from another only in parameters, without looking at the models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextvars import Context
from dataclasses import replace

from polymerge.errors import PolymergeError
from polymerge.methods.table import METHODS
from polymerge.planning.inputs import labels_of
from polymerge.planning.matrix_costs import is_matrix
from polymerge.planning.plan import Piece, Plan, Step
from polymerge.planning.unused import drops_at_random, has_no_effect, measures_tensors
from polymerge.recipe.overrides import Choice, Key, choices_of, key_of, rest_of, settings_of
from polymerge.recipe.parameters import Setting
from polymerge.recipe.recipe import Recipe, recipe_dict
from polymerge.recipe.stages import sources_of

__all__ = ["varied"]


def varied(plan: Plan, before: Recipe, recipe: Recipe) -> Plan | None:
    """The plan that `make_plan` would make of `recipe`, derived from the plan of `before`; None if it must be planned
    anew.

    The plans of a coefficient sweep differ only in their settings and in what has which, also where numbers change by
    depth, unless something other than parameters differs, a value is refused, or the plan notes something else.
    """
    if plan.of_adapters or len(plan.models) != len(recipe.models):
        return None
    if _without_parameters(before) != _without_parameters(recipe) or has_no_effect(before) != has_no_effect(recipe):
        return None
    base = _base(plan, recipe)
    methods = {recipe.merge_method, *(one.merge_method for one in recipe.overrides if one.merge_method)}
    if any(METHODS[method].models for method in methods) and recipe.base_model is not None and not base:
        return None  # it may be one of the two by another name
    try:  # in a context of its own, in which what is wrong is raised and not gathered: `make_plan` will say it
        was, now = (Context().run(_choices, one, base) for one in (before, recipe))
        if _filters(was) != _filters(now):
            return None
        made = Context().run(_settled, plan, now)
    except PolymergeError:
        return None
    if made is None or _noted(made.settings) != _noted(plan.settings):
        return None
    return replace(made, recipe=recipe_dict(recipe))


def _base(plan: Plan, recipe: Recipe) -> list[int]:
    """Indices of the models that are base_model: from the plan's base, or by name if it reads none."""
    if plan.base is not None:
        return [place for place, model in enumerate(plan.models) if model == plan.base]
    return [place for place, entry in enumerate(recipe.models) if entry.model == recipe.base_model]


def _choices(recipe: Recipe, base: Sequence[int]) -> list[Choice]:
    named = labels_of(sources_of(recipe))
    labels = [named[entry.model] for entry in recipe.models]
    return [one for one in choices_of(recipe, labels, recipe.models, base) if not one.setting.row.copies]


def _settled(plan: Plan, choices: Sequence[Choice]) -> Plan | None:
    """The plan with the settings of these choices, in the order in which the planner finds them."""
    depth = plan.inputs[plan.template].layers
    if depth is None and any(choice.schedule for choice in choices):
        return None  # it was written, and does not say how many layers a schedule is over
    settings = settings_of(choices, len(plan.models))

    def settled(step: Step, piece: Piece) -> Piece:
        if piece.setting is None:
            return piece
        choice = next(choice for choice in choices if choice.covers(piece.canonical))
        setting = choice.at(piece.canonical, step.name, depth or 0)
        if setting.whole and not is_matrix(piece.canonical, step.shape_of(piece)):
            setting = rest_of(setting, len(piece.reads))
        number = _number_of(setting, settings)
        return piece if number == piece.setting else replace(piece, setting=number)

    def of(step: Step) -> Step:
        pieces = tuple(settled(step, piece) for piece in step.pieces)
        return step if pieces == step.pieces else replace(step, pieces=pieces)

    steps = tuple(map(of, plan.steps))
    return replace(plan, settings=tuple(settings.values()), steps=steps)


def _number_of(setting: Setting, settings: dict[Key, Setting]) -> int:
    settings.setdefault(key_of(setting), setting)
    return [*settings].index(key_of(setting))


def _filters(choices: Sequence[Choice]) -> list[tuple[str, ...]]:
    """The filters of each choice, of which the plan says whether any tensor has them in its name."""
    return [choice.schedule.filters if choice.schedule else () for choice in choices]


def _noted(settings: Iterable[Setting]) -> list[tuple[object, ...]]:
    """What the plan notes of its settings, in order."""
    return list(dict.fromkeys((one.method, drops_at_random(one), measures_tensors(one)) for one in settings))


def _without_parameters(recipe: Recipe) -> Recipe:
    return replace(
        recipe,
        models=tuple(replace(entry, parameters={}) for entry in recipe.models),
        overrides=tuple(replace(override, parameters={}) for override in recipe.overrides),
        parameters={},
    )
