"""Read a recipe from YAML or a mapping, reporting all mistakes at once."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextvars import Context
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, get_args

from polymerge.checkpoints.discovery import is_plain
from polymerge.dtypes import NAMES
from polymerge.errors import (
    PolymergeError,
    RecipeError,
    Refused,
    collecting,
    did_you_mean,
    refuse,
    refuse_if_gathered,
    shown,
)
from polymerge.families.rules import PARTS
from polymerge.methods.own import find_method, installed
from polymerge.methods.table import ADAPTERS, METHODS
from polymerge.paths import because, given_path
from polymerge.recipe.mergekit_forms import FORMS, in_place, rewritten, source_of
from polymerge.recipe.parameters import UNREAD, read_parameters, unread_parameters
from polymerge.recipe.recipe import Branches, Missing, ModelEntry, Names, Override, Recipe, Vocab, recipe_dict
from polymerge.recipe.stages import in_order, stages_in
from polymerge.recipe.tokenizers import TOKENIZER_FIELDS, chat_template_of, tokenizer_source_of
from polymerge.recipe.yaml_values import read_documents

__all__ = ["as_recipe", "parse_recipe", "read_recipe"]

_FIELDS: Final = (
    "merge_method", "template", "base_model", "models", "parameters", "parts", "exclude", "overrides", "vocab",
    "dtype", "out_dtype", "seed", "branches", "ignore", "overflow", "missing", "names", "name", "layers", "calibrate",
    *FORMS, *TOKENIZER_FIELDS,
)  # fmt: skip
_MODEL_FIELDS: Final = ("model", "parameters", "family", "ignore")
_OVERRIDE_FIELDS: Final = ("layers", "match", "merge_method", "parameters")

_IGNORE: Final = "ignore has to be a list of globs on stored tensor names"

_MERGEKIT_METHODS: Final = ("passthrough",)
"""mergekit's other methods, with parameters that are unknown here."""

_NOTHING: Final[Mapping[str, Any]] = {}
"""Placeholder for the fields of a file that contains no recipe."""

_UNKNOWN: Final = "copy"
"""Placeholder for an unknown method: it requires nothing, so that no follow-up errors arise."""


def read_recipe(recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe) -> Recipe:
    """Read a recipe from a YAML file or a mapping of the same form; check one that was made in Python.

    Fields are named as in mergekit where the two agree; unsupported fields are refused by name.

    raises Refused with every problem of the recipe.
    """
    with collecting() as problems:
        return as_recipe(recipe)
    raise Refused(problems)  # where another block is open, which the problems were handed on to


def as_recipe(recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe) -> Recipe:
    """Like `parse_recipe`, and a `Recipe` that was made in Python is checked as one in a file is."""
    if not isinstance(recipe, Recipe):
        return parse_recipe(recipe)
    return recipe if recipe.read else parse_recipe(recipe_dict(recipe))


def parse_recipe(source: str | os.PathLike[str] | Mapping[str, Any]) -> Recipe:
    """Read as much of a recipe as possible, and refuse the rest.

    raises RecipeError if there is no such file, or it is not YAML.
    """
    folder = Path() if isinstance(source, Mapping) else given_path(source).parent
    stages = stages_in(source) if isinstance(source, Mapping) else _load(given_path(source))
    if len(stages) == 1:
        if not isinstance(stages[0], Mapping):
            raise RecipeError(f"recipe: stages: has to be a list of mappings of fields, got {_kind(stages[0])}")
        return _one(stages[0], folder)
    found = [_stage(stage, place, folder) for place, stage in enumerate(stages)]
    read = [stage for stage in found if stage is not None]
    if len(read) < len(found):
        refuse_if_gathered()
    return in_order(read)


def _stage(data: object, place: int, folder: Path) -> Recipe | None:
    """One of several stages; None if something in it is wrong, which is refused with its name."""
    name = data.get("name") if isinstance(data, Mapping) else None
    where = f"stage {place + 1}" if name is None else f"stage '{shown(name)}'"
    try:  # in a context of its own, so that what is wrong comes here
        return Context().run(_whole, data, folder)
    except PolymergeError as error:
        refuse(*(RecipeError(f"{where}: {problem}") for problem in error.problems))
    return None


def _whole(data: object, folder: Path) -> Recipe:
    with collecting(needed=True):
        if not isinstance(data, Mapping):
            raise RecipeError(f"has to be a mapping of fields, got {_kind(data)}")
        if "stages" in data:
            raise RecipeError("stages inside a stage. List them one after the other")
        return _one(data, folder)
    raise AssertionError("what was refused is raised at the end of the block")


def _one(data: Mapping[str, Any], folder: Path) -> Recipe:
    """Read a recipe without stages; files that it names are looked for in `folder`."""
    data = in_place(data)
    meant: set[str] = set(_FIELDS if data is _NOTHING else ())
    for name in data:
        if name not in _FIELDS:
            hint = did_you_mean(str(name), _FIELDS)
            refuse(RecipeError(f"recipe: unknown field '{shown(name)}' is not supported.{hint}"))
            meant |= set(get_close_matches(str(name), _FIELDS, n=1))
    unread = meant - set(data)
    method, known = _UNKNOWN, False
    if "merge_method" not in unread:
        method, known = _method(data.get("merge_method"), "recipe: merge_method")
    notes: tuple[str, ...] = ()
    if any(data.get(name) is not None for name in FORMS):
        if (found := rewritten(data, method)) is None:
            unread |= {"models"} - set(data)
        else:
            data, notes = found
    dtype, more = _dtypes(data)
    models: tuple[ModelEntry, ...] = ()
    if "models" not in unread:
        models, complete = _models(data.get("models"), judged=known)
        unread |= set() if complete else {"models"}
    base_model = _text(data, "base_model")
    unread |= {"base_model"} if base_model is None and data.get("base_model") is not None else set()
    parameters = (
        unread_parameters()
        if "parameters" in unread
        else read_parameters(_with_modifiers(data), "recipe: parameters", judged=known)
    )
    return Recipe(
        merge_method=method,
        models=models,
        template=_text(data, "template"),
        base_model=base_model,
        parameters=parameters,
        parts=_parts(data.get("parts")),
        exclude=_globs(data.get("exclude"), "recipe: exclude has to be a list of globs on canonical names"),
        overrides=_overrides(data.get("overrides"), judged=known),
        vocab=_word(data, "vocab", get_args(Vocab)),
        dtype=dtype,
        seed=_seed(data.get("seed", 42)),
        branches=_word(data, "branches", get_args(Branches)),
        ignore=_globs(data.get("ignore"), f"recipe: {_IGNORE}"),
        missing=_word(data, "missing", get_args(Missing)),
        names=_word(data, "names", get_args(Names)),
        overflow=_globs(data.get("overflow"), "recipe: overflow has to be a list of globs on canonical names"),
        tokenizer_source=tokenizer_source_of(data),
        chat_template=chat_template_of(data, folder),
        name=_name(data.get("name")),
        layers=_count(data.get("layers")),
        notes=(*notes, *more),
        unread=frozenset(unread),
        read=True,
    )


def _with_modifiers(data: Mapping[str, Any]) -> object:
    """The recipe's parameters with `calibrate`, which may also be a field of its own."""
    given = data.get("parameters")
    if data.get("calibrate") is None or not isinstance(given, Mapping | None):
        return given
    if given and "calibrate" in given:
        refuse(RecipeError("recipe: calibrate is set twice, the second time in parameters"))
    return {"calibrate": data["calibrate"], **(given or {})}


def _load(path: Path) -> list[Any]:
    """The stages in a file, mostly one; raises RecipeError if it is not there, or not YAML."""
    try:
        documents = read_documents(path)
    except (FileNotFoundError, NotADirectoryError):
        beside = [entry.name for entry in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, beside) if beside else ""
        raise RecipeError(f"{path}: no such recipe.{hint}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {because(error)}") from None
    if len(documents) > 1:
        return documents
    if not isinstance(documents[0], dict):
        refuse(RecipeError(f"{path}: a recipe has to be a mapping of fields, got {_kind(documents[0])}"))
        return [_NOTHING]
    return stages_in(documents[0])


def _method(value: object, where: str) -> tuple[str, bool]:
    """The method, or the one probably meant; and whether its parameters can be checked."""
    if value is None:
        refuse(RecipeError(f"{where} is missing.{did_you_mean('', METHODS)}"))
    elif value in _MERGEKIT_METHODS and value not in METHODS:
        known = ", ".join(sorted(METHODS))
        refuse(RecipeError(f"{where}: mergekit's method '{shown(value)}' is not supported. Known: {known}."))
    elif not isinstance(value, str) or not _is_there(value):
        spaces = next(one.choices for one in ADAPTERS if one.name == "space")
        hint = did_you_mean(str(value), {**METHODS, **installed()})
        if value in spaces:
            hint = f" It is a space for merging adapters: use ties, for example, with parameters: {{space: {value}}}."
        refuse(RecipeError(f"{where}: there is no method '{shown(value)}'.{hint}"))
        if close := get_close_matches(str(value), METHODS, n=1):
            return close[0], True
    elif value in METHODS:
        return value, True
    return _UNKNOWN, False


def _is_there(name: str) -> bool:
    """Whether there is a method of this name, perhaps in an installed package; one that does not load is refused."""
    try:
        return find_method(name) is not None
    except RecipeError as error:
        refuse(error)
        return True


def _models(value: object, *, judged: bool) -> tuple[tuple[ModelEntry, ...], bool]:
    """The models, and whether all could be read; `judged` as in `read_parameters`."""
    if not isinstance(value, list) or not value:
        refuse(RecipeError("recipe: models has to be a list of at least one entry `- model: FOLDER`"))
        return (), False
    entries = []
    for place, item in enumerate(value):
        where = f"recipe: models[{place}]"
        if isinstance(item, str | os.PathLike):
            item = {"model": item}
        model = source_of(item.get("model"), where) if isinstance(item, Mapping) else None
        if model is None:
            refuse(RecipeError(f"{where}: needs `model: FOLDER`, got {_kind(item)}"))
            continue
        meant = _unknown(item, _MODEL_FIELDS, where)
        family = item.get("family")
        if family is not None and not isinstance(family, str):
            refuse(RecipeError(f"{where}: family has to be a name, got {_kind(family)}"))
            family = None
        parameters = read_parameters(item.get("parameters"), f"{where}: parameters", judged=judged)
        ignore = _globs(item.get("ignore"), f"{where}: {_IGNORE}")
        entries.append(ModelEntry(model, {**meant, **parameters}, family, ignore))
    return tuple(entries), len(entries) == len(value)


def _overrides(value: object, *, judged: bool) -> tuple[Override, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        refuse(RecipeError(f"recipe: overrides has to be a list, got {_kind(value)}"))
        return ()
    overrides = []
    for place, item in enumerate(value):
        where = f"recipe: overrides[{place}]"
        if not isinstance(item, Mapping):
            refuse(RecipeError(f"{where}: has to be a mapping, got {_kind(item)}"))
            continue
        meant = _unknown(item, _OVERRIDE_FIELDS, where)
        match = item.get("match")
        if match is not None and not isinstance(match, str):
            refuse(RecipeError(f"{where}: match has to be a glob on canonical names, got {_kind(match)}"))
            match = None
        if item.get("layers") is None and item.get("match") is None and not {"layers", "match"} & set(meant):
            refuse(RecipeError(f"{where}: has neither layers nor match, so it would match nothing"))
        method, known = None, judged
        if item.get("merge_method") is not None:
            method, known = _method(item["merge_method"], where)
        parameters = read_parameters(item.get("parameters"), f"{where}: parameters", lists=True, judged=known)
        parameters = {**meant, **parameters}
        overrides.append(Override(_layers(item.get("layers"), where), match, method, parameters))
    return tuple(overrides)


def _layers(value: object, where: str) -> tuple[int, int] | None:
    if value is None:
        return None
    span = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9}))?\s*", str(value)) if not isinstance(value, bool) else None
    if span is None:
        refuse(
            RecipeError(f"{where}: layers has to be a layer or an inclusive range such as 0-5, got '{shown(value)}'")
        )
        return None
    first, last = int(span[1]), int(span[2] or span[1])
    if last < first:
        refuse(RecipeError(f"{where}: layers {value} ends before it starts"))
        return None
    return first, last


def _parts(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names:
        refuse(RecipeError(f"recipe: parts has to be a list out of {', '.join(PARTS)}; got {_kind(value)}"))
        return None
    for name in names:
        if name not in PARTS:
            refuse(RecipeError(f"recipe: parts: there is no part '{shown(name)}'.{did_you_mean(str(name), PARTS)}"))
    return tuple(name for name in names if name in PARTS)


def _globs(value: object, what: str) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else ([] if value is None else value)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        refuse(RecipeError(f"{what}, got {_kind(value)}"))
        return ()
    return tuple(names)


def _word(data: Mapping[str, Any], name: str, words: tuple[str, ...]) -> Any:
    """One of a set of words; the first if the recipe does not set it."""
    value = data.get(name, words[0])
    if isinstance(value, str) and value in words:
        return value
    refuse(RecipeError(f"recipe: {name} has to be {', '.join(words[:-1])} or {words[-1]}, got '{shown(value)}'"))
    return words[0]


def _dtypes(data: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    """The dtype of the output, and notes: mergekit's `out_dtype` where the recipe has it, else `dtype`."""
    dtype, out = (_dtype(name, data.get(name)) for name in ("dtype", "out_dtype"))
    if out is None or dtype in (None, out):
        return out or dtype, ()
    rounded = "" if dtype == "float32" else f", where mergekit first rounds the models to {dtype}"
    return out, (f"the output is {out}, by out_dtype; the arithmetic is float32 whatever dtype says{rounded}",)


def _dtype(name: str, value: object) -> str | None:
    if value is None or (isinstance(value, str) and value in NAMES):
        return value
    refuse(RecipeError(f"recipe: {name}: cannot merge to '{shown(value)}'.{did_you_mean(str(value), NAMES)}"))
    return None


def _name(value: object) -> str | None:
    if value is None or (isinstance(value, str) and is_plain(value) and not set("/+@") & set(value)):
        return value
    refuse(RecipeError(f"recipe: name has to be one that a folder can have, without + and @, got '{shown(value)}'"))
    return None


def _count(value: object) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    refuse(RecipeError(f"recipe: layers has to be the number of the text tower's layers, got '{shown(value)}'"))
    return None


def _seed(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    refuse(RecipeError(f"recipe: seed has to be an integer from 0, got '{shown(value)}'"))
    return 42


def _text(data: Mapping[str, Any], name: str) -> str | None:
    value = data.get(name)
    if value is None or (source := source_of(value, f"recipe: {name}")) is not None:
        return None if value is None else source
    refuse(RecipeError(f"recipe: {name} has to be a folder or a hub id, got {_kind(value)}"))
    return None


def _unknown(item: Mapping[str, Any], known: tuple[str, ...], where: str) -> dict[str, Any]:
    """Refuse unknown fields; the fields and parameters probably meant are returned as `UNREAD`."""
    unread: dict[str, Any] = {}
    for name in item:
        if name not in known:
            refuse(RecipeError(f"{where}: unknown field '{shown(name)}'.{did_you_mean(str(name), known)}"))
            close = get_close_matches(str(name), known, n=1)
            unread |= dict.fromkeys([str(name), *close], UNREAD) | (
                unread_parameters() if "parameters" in close else {}
            )
    return unread


def _kind(value: object) -> str:
    words = {dict: "a mapping", list: "a list", str: "a text", bool: "true/false", int: "a number", float: "a number"}
    return "nothing" if value is None or value == "" else words.get(type(value), f"a {type(value).__name__}")
