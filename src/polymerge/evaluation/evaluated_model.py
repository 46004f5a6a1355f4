"""The model to evaluate: a checkpoint, or a base with an adapter folded in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymerge.checkpoints.adapter import is_adapter
from polymerge.checkpoints.folder import bring, split_source
from polymerge.checkpoints.hub import locate, pinned
from polymerge.checkpoints.identity import content_digest
from polymerge.checkpoints.stores import is_url
from polymerge.errors import RecipeError
from polymerge.paths import exists, given_path
from polymerge.planning import Plan, make_plan
from polymerge.planning.folding import fold_recipe

__all__ = ["EvaluatedModel", "evaluated_model"]

_PLUS = "+"


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to evaluate.

    name    its name in tables
    folder  of the checkpoint, or of the base
    plan    the plan that folds the adapter into the base; None for a checkpoint
    """

    source: str
    name: str
    folder: Path
    plan: Plan | None

    def described(self) -> dict[str, Any]:
        """Its entry in results.json."""
        said = {"name": self.name, "source": self.source, "plan": None if self.plan is None else self.plan.hash}
        base, adapter = split_source(self.source) if self.plan is None else split_source(self.plan.inputs[0].source)
        commits = pinned((base, self.folder), *([(adapter, self._adapter)] if adapter and self._adapter else []))
        return said | ({"pinned": commits} if commits else {})

    def identity(self) -> dict[str, Any]:
        """The state that its answers depend on: its files by samples of their content, or their commit on the hub."""
        if self.plan is None:
            return {"source": self.source, "files": content_digest([self.folder])}
        places = [Path(place) for entry in self.plan.inputs for place in (entry.path, entry.adapter) if place]
        return {"source": self.source, "plan": self.plan.hash, "files": content_digest(places)}

    def fetch(self) -> None:
        """Download a checkpoint that is on the hub; a plan's models are downloaded when they are loaded."""
        if self.plan is None:
            bring(self.source, self.folder)

    @property
    def _adapter(self) -> Path | None:
        own = self.plan.inputs[0].adapter if self.plan is not None else ""
        return Path(own) if own else None


def evaluated_model(source: str, name: str | None = None) -> EvaluatedModel:
    """Locate the model to evaluate.

    source  a folder, a hub id, BASE+ADAPTER of such, or an adapter alone, whose config names its base
    name    its name in tables; by default the last part of the path, or of both paths

    raises RecipeError if there is none, Refused if base and adapter do not fit.
    """
    if not exists(source) and _PLUS in source:
        return _folded(source, {"merge_method": "copy", "models": [source]}, name)
    path = given_path(source)
    if path.is_file():
        raise RecipeError(f"{source}: is a file. Give the folder of a checkpoint, or BASE+ADAPTER")
    if not (path.exists() or is_url(source)) and (source.partition("@")[0].count("/") != 1 or path.parent.is_dir()):
        raise RecipeError(f"{source}: there is no such folder, and it is no hub id such as owner/name")
    folder = locate(source)
    if is_adapter(folder):
        return _folded(source, fold_recipe(source, None), name)
    if not (folder / "config.json").is_file():
        raise RecipeError(f"{source}: has no config.json. Give the folder of a checkpoint, or BASE+ADAPTER")
    return EvaluatedModel(source, name or (folder.name if path.exists() else _short(source)), folder, None)


def _folded(source: str, recipe: dict[str, Any], name: str | None) -> EvaluatedModel:
    plan = make_plan(recipe)
    return EvaluatedModel(source, name or _short(recipe["models"][0]), Path(plan.inputs[0].path), plan)


def _short(source: str) -> str:
    return _PLUS.join(Path(part.partition("@")[0]).name for part in source.split(_PLUS))
