"""Which model is evaluated: a checkpoint as it is, or a base with an adapter that is folded into it in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymerge.checkpoint.adapter import is_adapter
from polymerge.checkpoint.huberrors import hub_errors
from polymerge.errors import RecipeError
from polymerge.planning import AdapterPlan, Plan, make_plan
from polymerge.planning.folding import fold_recipe

__all__ = ["Subject", "subject"]

_PLUS = "+"


@dataclass(frozen=True)
class Subject:
    """A model that is to be evaluated.

    name    what tables call it
    folder  of the checkpoint, or of the base
    plan    that folds the adapter into the base; None for a checkpoint
    """

    source: str
    name: str
    folder: Path
    plan: Plan | AdapterPlan | None

    def described(self) -> dict[str, Any]:
        """What results.json says of it."""
        return {"name": self.name, "source": self.source, "plan": None if self.plan is None else self.plan.hash}

    def identity(self) -> dict[str, Any]:
        """What its answers depend on: the files, by name, size and the time at which they were written."""
        if self.plan is None:
            return {"source": self.source, "files": _digest([self.folder])}
        places = [Path(place) for entry in self.plan.inputs for place in (entry.path, entry.adapter) if place]
        return {"source": self.source, "plan": self.plan.hash, "files": _digest(places)}


def subject(source: str, name: str | None = None) -> Subject:
    """The model that MODEL on the command line is.

    source  a folder, a hub id, BASE+ADAPTER of such, or an adapter alone, whose config names its base
    name    what tables call it; by default the last part of the path, or of both paths

    raises RecipeError where there is none, Refused where base and adapter do not fit.
    """
    path = Path(source).expanduser()
    if path.is_file():
        raise RecipeError(f"{source}: is a file. Give the folder of a checkpoint, or BASE+ADAPTER")
    if path.is_dir() and not is_adapter(path):
        if not (path / "config.json").is_file():
            raise RecipeError(f"{source}: has no config.json. Give the folder of a checkpoint, or BASE+ADAPTER")
        return Subject(source, name or path.resolve().name, path.resolve(), None)
    if path.is_dir() or _PLUS in source:
        recipe = fold_recipe(source, None) if path.is_dir() else {"merge_method": "copy", "models": [source]}
        plan = make_plan(recipe)
        return Subject(source, name or _short(recipe["models"][0]), Path(plan.inputs[0].path), plan)
    return Subject(source, name or _short(source), _from_hub(source), None)


def _short(source: str) -> str:
    return _PLUS.join(Path(part.partition("@")[0]).name for part in source.split(_PLUS))


def _from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = source.partition("@")
    if repository.count("/") != 1 or Path(source).parent.is_dir():
        raise RecipeError(f"{source}: there is no such folder, and it is no hub id such as owner/name")
    with hub_errors(repository, revision or None):
        return Path(snapshot_download(repository, revision=revision or None))


def _digest(places: list[Path]) -> str:
    """sha256 of names, sizes and times of the files of some folders."""
    lines = []
    for place in places:
        for file in sorted(place.iterdir()) if place.is_dir() else [place]:
            if file.is_file():
                about = file.stat()
                lines.append(f"{file.name} {about.st_size} {about.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
