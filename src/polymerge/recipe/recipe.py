"""What the user asked for: a recipe, read from YAML or a mapping, with every mistake in it found at once."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Literal, TypeGuard

import yaml

from polymerge.dtypes import NAMES
from polymerge.errors import PolymergeError, RecipeError, did_you_mean, refuse_if_any
from polymerge.families.rules import PARTS
from polymerge.methods.table import ADAPTERS, METHODS
from polymerge.recipe.parameters import UNREAD, read_parameters, unread_parameters

__all__ = ["ModelEntry", "Override", "Recipe", "parse_recipe", "read_recipe", "recipe_dict"]

Vocab = Literal["template", "overlap", "by-token"]
Branches = Literal["fill", "retain"]

_FIELDS: Final = (
    "merge_method", "template", "base_model", "models", "parameters", "parts", "exclude", "overrides", "vocab",
    "dtype", "seed", "branches", "ignore",
)  # fmt: skip
_MODEL_FIELDS: Final = ("model", "parameters", "family", "ignore")
_OVERRIDE_FIELDS: Final = ("layers", "match", "merge_method", "parameters")

_IGNORE: Final = "ignore is a list of globs on names of tensors as stored"

_MERGEKIT: Final[Mapping[str, str]] = {
    "slices": "layers are always taken in place; use overrides with layers to treat some of them differently",
    "modules": "use parts and overrides",
    "tokenizer_source": "the output always has the template's tokenizer; vocab says what happens to the embeddings",
    "tokenizer": "the output always has the template's tokenizer; vocab says what happens to the embeddings",
    "chat_template": "the output has the template's chat template",
    "out_dtype": "use dtype",
}
"""Fields of mergekit's recipes that polymerge does not have, and what to use in their place."""

_MERGEKIT_METHODS: Final = (
    "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "karcher", "model_stock", "multislerp",
    "nearswap", "nuslerp", "passthrough", "ram", "ramplus_tl", "sce",
)  # fmt: skip
"""mergekit's other methods, with parameters that nothing here knows."""

_NOTHING: Final[Mapping[str, Any]] = {}
"""What is read of a file that holds no recipe."""

_IN_PLACE_OF: Final = {"slices": "models", "modules": "models"}
"""Fields of mergekit's that stand where another one would."""


@dataclass(frozen=True)
class ModelEntry:
    """One model to merge: folder, file or hub id, its own parameters, and its family where config.json is silent.

    ignore   globs on the names of its tensors as stored: what is left out of it
    """

    model: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    family: str | None = None
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True)
class Override:
    """Another method or other parameters for the tensors of some layers or names; the first that matches wins."""

    layers: tuple[int, int] | None = None
    match: str | None = None
    merge_method: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A merge as the user asked for it; field by field as the recipe file has it.

    unread   fields that were refused where they were read: what would follow from that is no problem of its own
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
    unread: frozenset[str] = field(default=frozenset(), compare=False, repr=False)


def read_recipe(source: str | os.PathLike[str] | Mapping[str, Any]) -> Recipe:
    """Read a recipe from a YAML file or a mapping of the same form.

    The fields are mergekit's where the two agree; a field that polymerge does not have is refused by name.

    raises Refused with every problem of the recipe.
    """
    problems: list[PolymergeError] = []
    recipe = parse_recipe(source, problems)
    refuse_if_any(problems)
    return recipe


def parse_recipe(source: str | os.PathLike[str] | Mapping[str, Any], problems: list[PolymergeError]) -> Recipe:
    """Read as much of a recipe as can be understood, and add what cannot to `problems`."""
    data = source if isinstance(source, Mapping) else _load(Path(source), problems)
    meant: set[str] = set(_FIELDS if data is _NOTHING else ())
    for name in data:
        if name not in _FIELDS:
            hint = f" {_MERGEKIT[name]}." if name in _MERGEKIT else did_you_mean(str(name), _FIELDS)
            kind = "mergekit's field" if name in _MERGEKIT else "unknown field"
            problems.append(RecipeError(f"recipe: {kind} '{name}' is not supported.{hint}"))
            meant |= {_IN_PLACE_OF[name]} if name in _IN_PLACE_OF else set(get_close_matches(str(name), _FIELDS, n=1))
    unread = meant - set(data)
    method, known = "copy", False
    if "merge_method" not in unread:
        method, known = _method(data.get("merge_method"), problems, "recipe: merge_method")
    models: tuple[ModelEntry, ...] = ()
    if "models" not in unread:
        models, complete = _models(data.get("models"), problems, judged=known)
        unread |= set() if complete else {"models"}
    base_model = _text(data, "base_model", problems)
    unread |= {"base_model"} if base_model is None and data.get("base_model") is not None else set()
    parameters = (
        unread_parameters()
        if "parameters" in unread
        else read_parameters(data.get("parameters"), "recipe: parameters", problems, judged=known)
    )
    return Recipe(
        merge_method=method,
        models=models,
        template=_text(data, "template", problems),
        base_model=base_model,
        parameters=parameters,
        parts=_parts(data.get("parts"), problems),
        exclude=_globs(data.get("exclude"), "recipe: exclude is a list of globs on canonical names", problems),
        overrides=_overrides(data.get("overrides"), problems, judged=known),
        vocab=_vocab(data.get("vocab", "template"), problems),
        dtype=_dtype(data.get("dtype"), problems),
        seed=_seed(data.get("seed", 42), problems),
        branches=_branches(data.get("branches", "fill"), problems),
        ignore=_globs(data.get("ignore"), f"recipe: {_IGNORE}", problems),
        unread=frozenset(unread),
    )


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data of the form it is read from; fields at their defaults are left out."""
    data: dict[str, Any] = {"merge_method": recipe.merge_method}
    for name in ("template", "base_model", "dtype"):
        if getattr(recipe, name) is not None:
            data[name] = getattr(recipe, name)
    data["models"] = [
        {"model": entry.model}
        | ({"parameters": dict(entry.parameters)} if entry.parameters else {})
        | ({"family": entry.family} if entry.family else {})
        | ({"ignore": list(entry.ignore)} if entry.ignore else {})
        for entry in recipe.models
    ]
    if recipe.parameters:
        data["parameters"] = dict(recipe.parameters)
    if recipe.parts is not None:
        data["parts"] = list(recipe.parts)
    for name in ("exclude", "ignore"):
        if getattr(recipe, name):
            data[name] = list(getattr(recipe, name))
    if recipe.overrides:
        data["overrides"] = [_override_dict(override) for override in recipe.overrides]
    return data | {"vocab": recipe.vocab, "branches": recipe.branches, "seed": recipe.seed}


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


class _OneValuePerKey(yaml.SafeLoader):
    """YAML that refuses a key written twice, which plain YAML lets pass and keeps the last of."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(None, None, f"'{key.value}' is written twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node


def _load(path: Path, problems: list[PolymergeError]) -> Mapping[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _OneValuePerKey)
    except (FileNotFoundError, NotADirectoryError):
        beside = [entry.name for entry in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, beside) if beside else ""
        raise RecipeError(f"{path}: there is no such recipe.{hint}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # a date such as 2024-13-01 is a ValueError
        raise RecipeError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        problems.append(RecipeError(f"{path}: a recipe is a mapping of fields, this is {_kind(data)}"))
        return _NOTHING
    return data


def _method(value: object, problems: list[PolymergeError], where: str) -> tuple[str, bool]:
    """The method, or the one that was meant, to find what else is wrong; and whether anything tells its parameters."""
    if value is None:
        problems.append(RecipeError(f"{where} is missing.{did_you_mean('', METHODS)}"))
    elif value in _MERGEKIT_METHODS and value not in METHODS:
        known = ", ".join(sorted(METHODS))
        problems.append(RecipeError(f"{where}: mergekit's method '{value}' is not supported. Known: {known}."))
    elif not isinstance(value, str) or value not in METHODS:
        spaces = next(one.choices for one in ADAPTERS if one.name == "space")
        hint = did_you_mean(str(value), METHODS)
        if value in spaces:
            hint = f" It is a space to merge adapters in: say ties, for one, and parameters: {{space: {value}}}."
        problems.append(RecipeError(f"{where}: there is no method '{value}'.{hint}"))
        if close := get_close_matches(str(value), METHODS, n=1):
            return close[0], True
    else:
        return value, True
    return "copy", False


def _models(value: object, problems: list[PolymergeError], *, judged: bool) -> tuple[tuple[ModelEntry, ...], bool]:
    """The models, and whether these are all; `judged` as in `read_parameters`."""
    if not isinstance(value, list) or not value:
        problems.append(RecipeError("recipe: models has to be a list of at least one entry `- model: FOLDER`"))
        return (), False
    entries = []
    for place, item in enumerate(value):
        where = f"recipe: models[{place}]"
        if isinstance(item, str | os.PathLike):
            item = {"model": item}
        if not isinstance(item, Mapping) or not _names_a_place(item.get("model")):
            problems.append(RecipeError(f"{where}: needs `model: FOLDER`, got {_kind(item)}"))
            continue
        meant = _unknown(item, _MODEL_FIELDS, where, problems)
        family = item.get("family")
        if family is not None and not isinstance(family, str):
            problems.append(RecipeError(f"{where}: family is a name, got {_kind(family)}"))
            family = None
        parameters = read_parameters(item.get("parameters"), f"{where}: parameters", problems, judged=judged)
        ignore = _globs(item.get("ignore"), f"{where}: {_IGNORE}", problems)
        entries.append(ModelEntry(os.fspath(item["model"]), {**meant, **parameters}, family, ignore))
    return tuple(entries), len(entries) == len(value)


def _overrides(value: object, problems: list[PolymergeError], *, judged: bool) -> tuple[Override, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        problems.append(RecipeError(f"recipe: overrides is a list, got {_kind(value)}"))
        return ()
    overrides = []
    for place, item in enumerate(value):
        where = f"recipe: overrides[{place}]"
        if not isinstance(item, Mapping):
            problems.append(RecipeError(f"{where}: is a mapping, got {_kind(item)}"))
            continue
        meant = _unknown(item, _OVERRIDE_FIELDS, where, problems)
        match = item.get("match")
        if match is not None and not isinstance(match, str):
            problems.append(RecipeError(f"{where}: match is a glob on canonical names, got {_kind(match)}"))
            match = None
        if item.get("layers") is None and item.get("match") is None and not {"layers", "match"} & set(meant):
            problems.append(RecipeError(f"{where}: says neither layers nor match, so it would match nothing"))
        method, known = None, judged
        if item.get("merge_method") is not None:
            method, known = _method(item["merge_method"], problems, where)
        parameters = read_parameters(item.get("parameters"), f"{where}: parameters", problems, lists=True, judged=known)
        parameters = {**meant, **parameters}
        overrides.append(Override(_layers(item.get("layers"), where, problems), match, method, parameters))
    return tuple(overrides)


def _layers(value: object, where: str, problems: list[PolymergeError]) -> tuple[int, int] | None:
    if value is None:
        return None
    span = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+))?\s*", str(value)) if not isinstance(value, bool) else None
    if span is None:
        problems.append(RecipeError(f"{where}: layers is a layer or an inclusive range such as 0-5, got '{value}'"))
        return None
    first, last = int(span[1]), int(span[2] or span[1])
    if last < first:
        problems.append(RecipeError(f"{where}: layers {value} ends before it starts"))
        return None
    return first, last


def _parts(value: object, problems: list[PolymergeError]) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names:
        problems.append(RecipeError(f"recipe: parts is a list out of {', '.join(PARTS)}; got {_kind(value)}"))
        return None
    for name in names:
        if name not in PARTS:
            problems.append(RecipeError(f"recipe: parts: there is no part '{name}'.{did_you_mean(str(name), PARTS)}"))
    return tuple(name for name in names if name in PARTS)


def _globs(value: object, what: str, problems: list[PolymergeError]) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else ([] if value is None else value)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        problems.append(RecipeError(f"{what}, got {_kind(value)}"))
        return ()
    return tuple(names)


def _vocab(value: object, problems: list[PolymergeError]) -> Vocab:
    if value == "template" or value == "overlap" or value == "by-token":
        return value
    problems.append(RecipeError(f"recipe: vocab is template, overlap or by-token, got '{value}'"))
    return "template"


def _branches(value: object, problems: list[PolymergeError]) -> Branches:
    if value == "fill" or value == "retain":
        return value
    problems.append(RecipeError(f"recipe: branches is fill or retain, got '{value}'"))
    return "fill"


def _dtype(value: object, problems: list[PolymergeError]) -> str | None:
    if value is None or (isinstance(value, str) and value in NAMES):
        return value
    problems.append(RecipeError(f"recipe: dtype: cannot merge to '{value}'.{did_you_mean(str(value), NAMES)}"))
    return None


def _seed(value: object, problems: list[PolymergeError]) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    problems.append(RecipeError(f"recipe: seed is a whole number from 0, got '{value}'"))
    return 42


def _text(data: Mapping[str, Any], name: str, problems: list[PolymergeError]) -> str | None:
    value = data.get(name)
    if value is None:
        return None
    if _names_a_place(value):
        return os.fspath(value)
    problems.append(RecipeError(f"recipe: {name} is a folder or a hub id, got {_kind(value)}"))
    return None


def _names_a_place(value: object) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(value, os.PathLike) or (isinstance(value, str) and bool(value.strip()))


def _unknown(
    item: Mapping[str, Any], known: tuple[str, ...], where: str, problems: list[PolymergeError]
) -> dict[str, Any]:
    """Name the fields that there are none of; returned are the fields and parameters that they may have meant."""
    unread: dict[str, Any] = {}
    for name in item:
        if name not in known:
            problems.append(RecipeError(f"{where}: unknown field '{name}'.{did_you_mean(str(name), known)}"))
            close = get_close_matches(str(name), known, n=1)
            unread |= dict.fromkeys([str(name), *close], UNREAD) | (
                unread_parameters() if "parameters" in close else {}
            )
    return unread


def _kind(value: object) -> str:
    words = {dict: "a mapping", list: "a list", str: "a text", bool: "true/false", int: "a number", float: "a number"}
    return "nothing" if value is None or value == "" else words.get(type(value), f"a {type(value).__name__}")
