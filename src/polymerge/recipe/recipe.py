"""A recipe as data, in the form of its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

__all__ = ["Branches", "Missing", "ModelEntry", "Names", "Override", "Recipe", "Vocab", "recipe_dict", "recipe_text"]

Vocab = Literal["template", "overlap", "by-token"]
Branches = Literal["fill", "retain"]
Missing = Literal["error", "copy"]
Names = Literal["template", "published"]


@dataclass(frozen=True)
class ModelEntry:
    """A model to merge: folder, file or hub id, its parameters, and its family if config.json does not tell.

    ignore   globs on its stored tensor names that are left out
    """

    model: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    family: str | None = None
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True)
class Override:
    """Another method or other parameters for some layers or names; the first match takes precedence.

    layers   the first and the last layer of the text tower
    match    a glob on canonical names
    """

    layers: tuple[int, int] | None = None
    match: str | None = None
    merge_method: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A merge as the user requested it, field by field as in the recipe file.

    overflow globs on canonical names of tensors in which numbers may become infinite
    tokenizer_source   base, union, or the model whose tokenizer the output has, with all tokens filled in
    chat_template      auto, or the template itself
    names    those of the output's tensors: the template's own, or those that its family is published with
    name     by which later stages name its output
    layers   the number of layers that the text tower has to have, if the recipe counts on it
    stages   the merges before this one whose outputs it names, in order
    notes    what is to be told of how it was read
    read     whether it was read from a file or a mapping, and so checked; else it is checked when it is planned
    unread   fields that were refused on reading, for which follow-up errors are suppressed
    """

    merge_method: str
    models: tuple[ModelEntry, ...]
    template: str | None = None
    base_model: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    vocab: Vocab = "template"
    dtype: str | None = None
    seed: int = 42
    branches: Branches = "fill"
    ignore: tuple[str, ...] = ()
    missing: Missing = "error"
    overflow: tuple[str, ...] = ()
    tokenizer_source: str | None = None
    chat_template: str | None = None
    names: Names = "template"
    name: str | None = None
    layers: int | None = None
    stages: tuple[Recipe, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)
    read: bool = field(default=False, compare=False, repr=False)
    unread: frozenset[str] = field(default=frozenset(), compare=False, repr=False)


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data in the form it is read from; fields with default values are omitted."""
    data: dict[str, Any] = {"stages": [recipe_dict(stage) for stage in recipe.stages]} if recipe.stages else {}
    data["merge_method"] = recipe.merge_method
    for name in ("name", "template", "base_model", "tokenizer_source", "chat_template", "dtype", "layers"):
        if getattr(recipe, name) is not None:
            data[name] = getattr(recipe, name)
    # of a recipe made in Python an entry may be a mere path, which reading it again makes right
    data["models"] = [_model_dict(entry) if isinstance(entry, ModelEntry) else entry for entry in recipe.models]
    if recipe.parameters:
        data["parameters"] = dict(recipe.parameters)
    if recipe.parts is not None:
        data["parts"] = list(recipe.parts)
    for name in ("exclude", "ignore", "overflow"):
        if getattr(recipe, name):
            data[name] = list(getattr(recipe, name))
    if recipe.overrides:
        data["overrides"] = [_override_dict(override) for override in recipe.overrides]
    if recipe.missing != "error":
        data["missing"] = recipe.missing
    if recipe.names != "template":
        data["names"] = recipe.names
    return data | {"vocab": recipe.vocab, "branches": recipe.branches, "seed": recipe.seed}


def recipe_text(recipe: Recipe) -> str:
    """The recipe as the YAML that it is read from; lists of numbers are on one line."""
    return yaml.dump(recipe_dict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20)


class _Dumper(yaml.SafeDumper):
    """Writes lists of numbers on one line, and all else in blocks."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        plain = all(isinstance(one, int | float) for one in sequence)
        return super().represent_sequence(tag, sequence, flow_style=plain or flow_style)

    def ignore_aliases(self, _data: object) -> bool:
        return True


def _model_dict(entry: ModelEntry) -> dict[str, Any]:
    return (
        {"model": entry.model}
        | ({"parameters": dict(entry.parameters)} if entry.parameters else {})
        | ({"family": entry.family} if entry.family else {})
        | ({"ignore": list(entry.ignore)} if entry.ignore else {})
    )


def _override_dict(override: Override) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if override.layers is not None:
        data["layers"] = "{}-{}".format(*override.layers)
    if override.match is not None:
        data["match"] = override.match
    if override.merge_method is not None:
        data["merge_method"] = override.merge_method
    if override.parameters:
        data["parameters"] = dict(override.parameters)
    return data
