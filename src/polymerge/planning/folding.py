"""Fold an adapter into its base: the plan of a merge of one model, the base with its adapter, in which all is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polymerge.checkpoints.adapter import open_adapter
from polymerge.checkpoints.hub import locate
from polymerge.errors import RecipeError

__all__ = ["base_named", "fold_recipe"]


def fold_recipe(adapter: str, base: str | None, ignore: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe that folds `adapter` into `base`, by default the model that the adapter's config names.

    ignore  globs on names of tensors as stored, in either of them, that are left out

    raises RecipeError where `adapter` is no adapter, or names no base, and what `open_adapter` raises.
    """
    named = base or base_named(open_adapter(adapter, locate(adapter)).config)
    if not named:
        raise RecipeError(f"{adapter}: its config names no base. Say which model it was trained on with --base")
    recipe: dict[str, Any] = {"merge_method": "copy", "models": [f"{named}+{adapter}"]}
    return recipe | ({"ignore": list(ignore)} if ignore else {})


def base_named(config: Mapping[str, Any]) -> str | None:
    """The base that an adapter's config names, at the revision that it names; None where it names none."""
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if base and revision and not Path(str(base)).expanduser().exists():
        return f"{base}@{revision}"
    return base or None
