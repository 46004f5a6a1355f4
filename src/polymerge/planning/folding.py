"""Fold an adapter into its base: the plan of a merge of one model, the base with its adapter, in which all is kept."""

from __future__ import annotations

from typing import Any

from polymerge.checkpoint.adapter import is_adapter, open_adapter
from polymerge.checkpoint.hub import locate
from polymerge.errors import RecipeError

__all__ = ["fold_recipe"]


def fold_recipe(adapter: str, base: str | None) -> dict[str, Any]:
    """The recipe that folds `adapter` into `base`, by default the model that the adapter's config names.

    raises RecipeError where `adapter` is no adapter, or names no base.
    """
    path = locate(adapter)
    if not is_adapter(path):
        raise RecipeError(f"{adapter}: is no adapter, for it has no adapter_config.json. Name the adapter to be folded")
    named = base or open_adapter(adapter, path).config.get("base_model_name_or_path")
    if not named:
        raise RecipeError(f"{adapter}: its config names no base. Say which model it was trained on with --base")
    return {"merge_method": "copy", "models": [f"{named}+{adapter}"]}
