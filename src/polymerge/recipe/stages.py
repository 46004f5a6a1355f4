"""Several merges in one recipe: stages, whose later ones name earlier ones, put in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from polymerge.errors import RecipeError, refuse
from polymerge.paths import exists
from polymerge.recipe.recipe import Recipe

__all__ = ["in_order", "sources_of", "stages_in"]


def sources_of(recipe: Recipe) -> tuple[str, ...]:
    """Every source that a recipe names, each once; not those of its earlier stages."""
    named = [entry.model for entry in recipe.models]
    named += [name for name in (recipe.template, recipe.base_model) if name is not None]
    return tuple(dict.fromkeys(named))


def stages_in(data: Mapping[str, Any]) -> list[Any]:
    """The stages of a recipe as it is written: those under `stages`, and then the rest of it; or itself alone.

    raises RecipeError if `stages` is not a list.
    """
    if data.get("stages") is None:
        return [{name: value for name, value in data.items() if name != "stages"}]
    rest = {name: value for name, value in data.items() if name != "stages"}
    if not isinstance(data["stages"], list) or not data["stages"]:
        raise RecipeError("recipe: stages has to be a list of recipes, of which later ones name earlier ones by `name`")
    return [*data["stages"], *([rest] if rest else [])]


def in_order(stages: Sequence[Recipe]) -> Recipe:
    """The recipe of the output, with the stages that it needs, each after those that it names.

    The output is that of the stage without a name, as in mergekit, or else of the last.

    refuses names that are missing, that two stages have or that are written otherwise, and stages in a circle
    """
    unnamed = [place for place, stage in enumerate(stages) if stage.name is None]
    output = unnamed[0] if unnamed else len(stages) - 1
    for place in unnamed[1:]:
        refuse(RecipeError(f"recipe: stage {place + 1} of {len(stages)} needs a `name`, by which another can name it"))
    names = [stage.name for stage in stages if stage.name is not None]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        refuse(RecipeError(f"recipe: two stages have the name '{name}'"))
    by_name = {stage.name: stage for stage in reversed(stages) if stage.name is not None}
    for stage in stages:
        _check_sources(stage, names)
    order: list[Recipe] = []
    _visit(stages[output], by_name, order, ())
    idle = [name for name in names if by_name[name] not in order and by_name[name] is not stages[output]]
    notes = [f"stage '{name}' is left out: no other names it" for name in dict.fromkeys(idle)]
    last = stages[output]
    return replace(last, stages=tuple(order[:-1]), notes=(*notes, *last.notes))


def _visit(stage: Recipe, by_name: Mapping[str, Recipe], order: list[Recipe], above: tuple[str, ...]) -> None:
    """Add a stage to the order after those that it names; `above` are the names of those that need it."""
    for source in sources_of(stage):
        if source in (*above, stage.name):
            circle = [*(*above, stage.name or "")[(*above, stage.name).index(source) :], source]
            refuse(RecipeError(f"recipe: stages in a circle: {' needs '.join(repr(name) for name in circle)}"))
        elif source in by_name and by_name[source] not in order:
            _visit(by_name[source], by_name, order, (*above, *([stage.name] if stage.name else [])))
    if stage not in order:
        order.append(stage)


def _check_sources(stage: Recipe, names: Sequence[str]) -> None:
    """Refuse a source that is nearly the name of a stage, or one with an adapter."""
    for source in sources_of(stage):
        base, plus, _ = source.partition("+")
        if plus and base in names:
            refuse(RecipeError(f"recipe: '{source}': an adapter cannot be folded into a stage. Fold it into a model "
                               "that the stage merges"))  # fmt: skip
            continue
        near = get_close_matches(source, names, n=1, cutoff=0.8)
        if near and source not in names and "/" not in source and not exists(source):
            refuse(RecipeError(f"recipe: '{source}': there is no such folder or stage. Did you mean '{near[0]}'?"))
