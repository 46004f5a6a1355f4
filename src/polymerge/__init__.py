"""Merge multimodal language models without training.

`plan` reads a recipe and checkpoint headers and states every tensor's fate; `merge` carries it out; `verify` checks
that a folder loads. Importing polymerge imports none of what these need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polymerge.engine.merge import Merged, merge
    from polymerge.engine.verify import Verification, verify
    from polymerge.errors import PolymergeError
    from polymerge.planning import Plan
    from polymerge.planning import make_plan as plan
    from polymerge.recipe.parsing import read_recipe
    from polymerge.recipe.recipe import Recipe

__all__ = ["Merged", "Plan", "PolymergeError", "Recipe", "Verification", "merge", "plan", "read_recipe", "verify"]

_HOMES = {
    "Merged": "polymerge.engine.merge",
    "Plan": "polymerge.planning",
    "PolymergeError": "polymerge.errors",
    "Recipe": "polymerge.recipe.recipe",
    "Verification": "polymerge.engine.verify",
    "merge": "polymerge.engine.merge",
    "plan": "polymerge.planning",
    "read_recipe": "polymerge.recipe.parsing",
    "verify": "polymerge.engine.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'polymerge' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), "make_plan" if name == "plan" else name)
