"""From a recipe to a plan: of checkpoints, or of adapters where the recipe's models are adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from polymerge.errors import collecting
from polymerge.planning.adapters import names_adapters, plan_adapters
from polymerge.planning.pairs import AdapterPlan
from polymerge.planning.plan import Plan
from polymerge.planning.planner import plan_checkpoints
from polymerge.recipe.parsing import parse_recipe
from polymerge.recipe.recipe import Recipe

__all__ = ["make_plan"]


def make_plan(source: str | os.PathLike[str] | Mapping[str, Any] | Recipe) -> Plan | AdapterPlan:
    """Plan a merge from a recipe and the headers of the checkpoints, or adapters, that it names.

    source   a recipe file, a mapping of the same form, or a `Recipe`

    raises Refused with every problem of the recipe, of the models, and of how they fit together.
    """
    with collecting() as problems:
        recipe = source if isinstance(source, Recipe) else parse_recipe(source)
        return (plan_adapters if names_adapters(recipe, problems) else plan_checkpoints)(recipe, problems)
    raise AssertionError("unreachable: what ends the block is raised")
