"""Other ways in which mergekit's recipes say the same: slices, modules and models as mappings, rewritten to our fields.

Behind this there is one form: models, parameters, and overrides of layers. Layers stay in place, so slices that move,
repeat or drop some are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeGuard

from polymerge.errors import RecipeError, collecting, did_you_mean, refuse, shown
from polymerge.methods.table import METHODS

__all__ = ["FORMS", "in_place", "rewritten", "source_of"]

FORMS: Final = ("slices", "modules")
"""Fields of mergekit's that stand in place of `models`."""

_SLICE: Final = ("sources", "base_model", "residual_weight", "parameters")
_SOURCE: Final = ("model", "layer_range", "parameters")
_MODULE: Final = ("slices", "models", "parameters")
_OTHER_LAYERS: Final = (
    "Layers stay in place here: for a model with other layers, make it with mergekit's passthrough and merge that"
)
_OUTSIDE_AFTER: Final = ("text.norm*", "text.lm_head*")
"""Globs on what comes after the layers, which the last slice counts for; the first counts for all else outside."""


def in_place(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe of mergekit's passthrough, if each of its slices has one source, as an average of one model for each
    layer; any other recipe as it is.
    """
    slices = data.get("slices")
    one_each = isinstance(slices, list) and all(
        isinstance(one, Mapping) and isinstance(one.get("sources"), list) and len(one["sources"]) == 1 for one in slices
    )
    if data.get("merge_method") != "passthrough" or not one_each:
        return data
    assert isinstance(slices, list)
    own = [one | {"sources": [_scaled(source) for source in one["sources"]]} for one in map(_scaled, slices)]
    general = _scaled(data).get("parameters") or {}
    if isinstance(general, Mapping):
        general = {**general, "weight": _chain([general.get("weight"), 1.0]), "normalize": False}
    return {**data, "merge_method": "linear", "slices": own, "parameters": general}


def _scaled(item: Any) -> Any:
    """A mapping whose parameter `scale`, if it has one, is a weight."""
    parameters = item.get("parameters") if isinstance(item, Mapping) else None
    if not isinstance(parameters, Mapping) or "scale" not in parameters:
        return dict(item) if isinstance(item, Mapping) else item
    rest = {name: value for name, value in parameters.items() if name != "scale"}
    return {**item, "parameters": {**rest, "weight": parameters["scale"]}}


def rewritten(data: Mapping[str, Any], method: str) -> tuple[Mapping[str, Any], tuple[str, ...]] | None:
    """A recipe with its slices or modules as models and overrides, and notes on it; None if they are refused.

    data    a recipe as it is written, with other fields as they are
    method  its method
    """
    found: dict[str, Any] = {}
    with collecting() as problems:
        here = [name for name in ("models", *FORMS) if data.get(name) is not None]
        if len(here) > 1:
            raise RecipeError(f"recipe: {' and '.join(here)} cannot stand side by side; say one of them")
        found = dict(data)
        field = here[0]
        if field == "modules":
            found = _without_modules(found)
        if "slices" in found:
            found = _without_slices(found, method)
    if problems:
        return None
    kept = ("models", "parts", "parameters", "overrides", "layers")
    told = json.dumps({name: found[name] for name in kept if found.get(name)}, default=str)
    return found, (f"{field} keep all layers in place and are read as {told}",)


def source_of(value: object, where: str) -> str | None:
    """A model as one text: a folder, a hub id with its revision, or BASE+ADAPTER, all of which mergekit's recipes may
    write as mappings; None, with the error refused, if it is none of these.
    """
    if _names_a_place(value):
        return os.fspath(value)
    if isinstance(value, Mapping) and not value.keys() - {"path", "revision"}:
        value = {"model": value}
    if not isinstance(value, Mapping) or value.keys() - {"model", "lora", "override_architecture"}:
        return None
    if value.get("override_architecture") is not None:
        refuse(
            RecipeError(
                f"{where}: override_architecture is not supported. Families are told by config.json and tensor names; "
                "say `family:` for a model that is read as another"
            )
        )
    parts = [_path(value.get(name)) for name in ("model", "lora") if value.get(name) is not None]
    return "+".join(part for part in parts if part) if parts and all(parts) else None


def _path(value: object) -> str | None:
    if _names_a_place(value):
        return os.fspath(value)
    if not isinstance(value, Mapping) or not _names_a_place(value.get("path")):
        return None
    revision = value.get("revision")
    return os.fspath(value["path"]) + (f"@{revision}" if isinstance(revision, str) and revision else "")


def _names_a_place(value: object) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(value, os.PathLike) or (isinstance(value, str) and bool(value.strip()))


def _without_modules(data: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with the slices or models of its modules as its own, where they are the same for all of them."""
    modules = data["modules"]
    if not isinstance(modules, Mapping) or not modules:
        raise RecipeError("recipe: modules has to be a mapping of names to what is merged in each")
    found = [dict(_fields(one, _MODULE, f"recipe: modules: {shown(name)}")) for name, one in modules.items()]
    if any(one != found[0] for one in found):
        raise RecipeError(
            "recipe: modules: several parts of a model are merged in several ways. Say the models once, with `parts` "
            'to merge and `overrides` with globs such as "vision.*" for those that are merged otherwise'
        )
    held = [name for name in ("slices", "models") if found[0].get(name) is not None]
    if len(held) != 1:
        raise RecipeError("recipe: modules: each needs either slices or models")
    own = _mapping(found[0].get("parameters"), "recipe: modules")
    general = _chains([own, _mapping(data.get("parameters"), "recipe")])
    more: dict[str, Any] = {"parameters": general} if general else {}
    if [*modules] == ["text_decoder"] and data.get("parts") is None:
        more["parts"] = ["text"]
    return {name: value for name, value in data.items() if name != "modules"} | {held[0]: found[0][held[0]]} | more


@dataclass(frozen=True)
class _Slice:
    """Some layers in place: first and last, the parameters of each model in them, and those of all."""

    first: int
    last: int
    sources: Mapping[str, Mapping[str, Any]]
    parameters: Mapping[str, Any]


def _without_slices(data: Mapping[str, Any], method: str) -> dict[str, Any]:
    """A recipe with its slices as models and, if there are several, overrides."""
    slices = list(_read_slices(data))
    _check_in_place(slices)
    names = list(dict.fromkeys(name for one in slices for name in one.sources))
    _check_absent(slices, names, method)
    general = _mapping(data.get("parameters"), "recipe")
    rest = {name: value for name, value in data.items() if name != "slices"} | {"layers": slices[-1].last + 1}
    if len(slices) == 1:
        models = [_entry(name, slices[0].sources[name]) for name in names]
        return rest | {"models": models, "parameters": _chains([slices[0].parameters, general])}
    inside = [_in_slice(one, names, general, method) for one in slices]
    overrides = [
        {"layers": f"{one.first}-{one.last}", "parameters": own} for one, own in zip(slices, inside, strict=True)
    ]
    if inside[0] != inside[-1]:
        overrides += [{"match": glob, "parameters": inside[-1]} for glob in _OUTSIDE_AFTER]
    each = {name for name in inside[0] if _is_each(method, name)}
    models = [_entry(model, {name: inside[0][name][place] for name in each}) for place, model in enumerate(names)]
    own = {name: value for name, value in inside[0].items() if name not in each}
    overrides += data["overrides"] if isinstance(data.get("overrides"), list) else []
    return rest | {"models": models, "parameters": own, "overrides": overrides}


def _read_slices(data: Mapping[str, Any]) -> Iterator[_Slice]:
    slices = data["slices"]
    if not isinstance(slices, list) or not slices:
        raise RecipeError("recipe: slices has to be a list of at least one entry with sources")
    for place, item in enumerate(slices):
        where = f"recipe: slices[{place}]"
        said = _fields(item, _SLICE, where)
        if said.get("residual_weight") is not None:
            raise RecipeError(f"{where}: residual_weight is not supported")
        if said.get("base_model") not in (None, data.get("base_model")):
            raise RecipeError(
                f"{where}: base_model is another than the recipe's. One base_model serves all layers here"
            )
        sources = said.get("sources")
        if not isinstance(sources, list) or not sources:
            raise RecipeError(f"{where}: sources has to be a list of models, each with a layer_range")
        found: dict[str, Mapping[str, Any]] = {}
        spans = []
        for number, source in enumerate(sources):
            named = f"{where}: sources[{number}]"
            own = _fields(source, _SOURCE, named)
            model = source_of(own.get("model"), named)
            if model is None:
                raise RecipeError(f"{named}: needs `model: FOLDER`")
            if model in found:
                raise RecipeError(f"{named}: '{model}' stands here twice. {_OTHER_LAYERS}")
            found[model] = _mapping(own.get("parameters"), named)
            spans.append(_span(own.get("layer_range"), named))
        if odd := [span for span in spans if span != spans[0]]:
            raise RecipeError(
                f"{where}: layers {spans[0][0]}-{spans[0][1] - 1} of one model and {odd[0][0]}-{odd[0][1] - 1} of "
                f"another move some of them. {_OTHER_LAYERS}"
            )
        yield _Slice(spans[0][0], spans[0][1] - 1, found, _mapping(said.get("parameters"), where))


def _check_in_place(slices: Sequence[_Slice]) -> None:
    """Require slices that are all layers, each once, in their order."""
    following = 0
    for place, one in enumerate(slices):
        if one.first != following:
            what = "drop" if one.first > following else "repeat or move"
            raise RecipeError(
                f"recipe: slices[{place}]: begins with layer {one.first} where layer {following} would follow: these "
                f"slices {what} layers. {_OTHER_LAYERS}"
            )
        following = one.last + 1


def _check_absent(slices: Sequence[_Slice], names: Sequence[str], method: str) -> None:
    """Require a method with weights if some models are not in all slices: where one is absent, its weight is 0."""
    row = METHODS.get(method)
    if row is None or not any(set(one.sources) != set(names) for one in slices):
        return
    if row.parameter("weight") is None or row.models is not None:
        raise RecipeError(
            f"recipe: slices: these merge other models in some layers than in others, and {method} has no weight that "
            "could be 0 there. Use several recipes, as stages"
        )


def _in_slice(one: _Slice, names: Sequence[str], general: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The parameters of an override for a slice: one value per model where the method has that."""
    found: dict[str, Any] = {}
    every = dict.fromkeys([*(name for own in one.sources.values() for name in own), *one.parameters, *general])
    for name in every:
        if not _is_each(method, name):
            if any(name in own for own in one.sources.values()):
                raise RecipeError(
                    f"recipe: slices: {name} is a single value for the merge, which mergekit does not read of a "
                    "source. Set it in the slice's or the recipe's own parameters, or remove it"
                )
            found[name] = _chain([one.parameters.get(name), general.get(name)])
            continue
        row = METHODS[method].parameter("scale" if name == "lambda" else name)
        default = None if row is None else row.default
        found[name] = [
            _chain([one.sources[model].get(name), one.parameters.get(name), general.get(name), default])
            if model in one.sources
            else (0.0 if name == "weight" else default)
            for model in names
        ]
    return found


def _is_each(method: str, name: str) -> bool:
    row = METHODS.get(method)
    parameter = None if row is None else row.parameter(name)
    return parameter is not None and parameter.each


def _chains(said: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Parameters of which the first mapping that has a value for a tensor counts."""
    return {
        name: _chain([one.get(name) for one in said]) for name in dict.fromkeys(name for one in said for name in one)
    }


def _chain(values: Sequence[Any]) -> Any:
    """One value of several, the first of which counts wherever its conditions hold, and so on."""
    conditions: list[Any] = []
    for value in values:
        if value is None:
            continue
        alternatives = [value] if isinstance(value, Mapping) else value
        if not (isinstance(alternatives, list) and alternatives and isinstance(alternatives[0], Mapping)):
            return [*conditions, {"value": value}] if conditions else value
        conditions += alternatives
        if any(isinstance(one, Mapping) and one.get("filter") in (None, "*") for one in alternatives):
            break
    return conditions or None


def _entry(model: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": model} | ({"parameters": dict(parameters)} if parameters else {})


def _span(value: object, where: str) -> tuple[int, int]:
    """The first layer, and the one after the last."""
    numbers = value if isinstance(value, list | tuple) else []
    if len(numbers) == 2 and all(isinstance(one, int) and not isinstance(one, bool) for one in numbers):
        first, end = numbers
        if 0 <= first < end:
            return first, end
    raise RecipeError(f"{where}: layer_range has to be two numbers, the first layer and the one after the last, as "
                      f"[0, 32]; got '{shown(value)}'")  # fmt: skip


def _fields(item: object, known: Sequence[str], where: str) -> Mapping[str, Any]:
    if not isinstance(item, Mapping):
        raise RecipeError(f"{where}: has to be a mapping, got '{shown(item)}'")
    for name in item:
        if name not in known:
            raise RecipeError(f"{where}: unknown field '{shown(name)}'.{did_you_mean(str(name), known)}")
    return item


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where}: parameters: has to be a mapping of names to values, got '{shown(value)}'")
    return value
