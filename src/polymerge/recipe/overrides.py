"""Choose the method and parameters of each tensor: the recipe's, or those of the first override that matches."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from polymerge.errors import RecipeError, refuse
from polymerge.families.rules import text_layer, without_branch
from polymerge.methods.table import ADAPTERS, METHODS
from polymerge.recipe.parameters import UNREAD, Setting, resolve
from polymerge.recipe.recipe import ModelEntry, Override, Recipe

__all__ = ["Choice", "choices_of", "choices_of_adapters", "key_of", "matches", "rest_of", "settings_of"]

Key = tuple[str, tuple[tuple[str, object], ...]]
"""What equal settings are recognised by."""


@dataclass(frozen=True)
class Choice:
    """A setting and its scope: the tensors of some text layers, those that a glob matches, or all."""

    setting: Setting
    where: str
    layers: tuple[int, int] | None = None
    match: str | None = None

    @property
    def key(self) -> Key:
        """A key by which equal settings are recognised."""
        return key_of(self.setting)

    def covers(self, canonical: str) -> bool:
        """Return whether a tensor of this canonical name gets this setting."""
        if self.layers is not None:
            layer = text_layer(canonical)
            if layer is None or not self.layers[0] <= layer <= self.layers[1]:
                return False
        return self.match is None or matches(canonical, self.match)


def key_of(setting: Setting) -> Key:
    """A key by which equal settings are recognised."""
    return setting.method, tuple(sorted(setting.parameters.items()))


def rest_of(setting: Setting, models: int) -> Setting:
    """How a merge by a method on matrices treats a tensor that is none: the mean of the deltas, each times its weight.

    models  their number
    """
    weight = setting.parameters.get("weight", (1.0,) * models)
    shares = tuple(number / models for number in weight)
    scale = setting.parameters.get("scale", 1.0)
    return Setting("task_arithmetic", {"weight": shares, "normalize": False, "scale": scale}, setting.on_base)


def settings_of(choices: Sequence[Choice], models: int) -> dict[Key, Setting]:
    """The distinct settings that merge something, then those for what is no matrix where a method works on these.

    models  their number
    """
    own = {choice.key: choice.setting for choice in choices if not choice.setting.row.copies}
    rests = [rest_of(setting, models) for setting in own.values() if setting.row.on == "matrices"]
    return own | {key_of(rest): rest for rest in rests if key_of(rest) not in own}


def matches(canonical: str, glob: str) -> bool:
    """Return whether a glob matches an entire canonical name; a glob without a branch (`@text`) matches every
    branch.
    """
    return fnmatchcase(canonical, glob) or fnmatchcase(without_branch(canonical), glob)


def choices_of(
    recipe: Recipe, labels: Sequence[str], entries: Sequence[ModelEntry], base: Collection[int] = ()
) -> list[Choice]:
    """Every setting of a recipe, in order of precedence; the last one covers everything.

    labels   [entry] names of the models for messages
    base     indices of the entries that are base_model

    refuses (`polymerge.errors.refuse`) what cannot be resolved.
    """
    per_model = [entry.parameters for entry in entries]
    choices = [
        Choice(
            resolve(method, layers, per_model, labels, base=base, on_base=recipe.base_model is not None),
            where,
            override.layers,
            override.match,
        )
        for method, where, layers, override in _asked(recipe)
    ]
    settings = {choice.setting.method: choice.setting for choice in choices}
    _refuse_unlisted(recipe, settings, base)
    for method, setting in settings.items():
        row = setting.row
        count, beside = len(entries) - len(base), " beside base_model"
        if not setting.on_deltas:
            count, beside = len(entries), ""
        wanted = f"{row.models} models" if row.models is not None else f"{row.fewest} models or more"
        if (0 < count < row.fewest or row.models not in (None, count)) and "models" not in recipe.unread:
            refuse(RecipeError(f"{method} takes {wanted}{beside}, the recipe has {count}"))
        if row.on == "factors":
            refuse(RecipeError(f"{method} merges adapters (folders with adapter_config.json), not checkpoints"))
        if row.needs_base and recipe.base_model is None and "base_model" not in recipe.unread:
            refuse(RecipeError(f"{method} works on deltas and needs base_model, their common ancestor"))
    return choices


def choices_of_adapters(recipe: Recipe, labels: Sequence[str]) -> list[Choice]:
    """Every setting of a recipe for adapters, in order of precedence; the last one covers everything.

    labels   [model] names of the adapters for messages

    refuses (`polymerge.errors.refuse`) what cannot be resolved.
    """
    per_model = [entry.parameters for entry in recipe.models]
    extra = METHODS.get(str(recipe.parameters.get("extra")))
    beside = {"space", *(parameter.name for parameter in (extra.parameters if extra else ()))}
    choices = []
    for method, where, layers, override in _asked(recipe):
        row = METHODS[method]
        if not row.takes_adapters:
            refuse(RecipeError(f"{method} works on checkpoints, not on adapters"))
        more = tuple(one for one in ADAPTERS if one.name != "space" or row.entrywise)
        if not row.entrywise and not row.copies and any("space" in given for given in (layers[-1][1], *per_model)):
            refuse(RecipeError(f"recipe: {where}: {method} merges factors in its own way and takes no space"))
        setting = resolve(method, layers, per_model, labels, more, beside)
        if setting.parameters.get("trim") == "model":
            refuse(RecipeError(f"{method}: trim: model is for checkpoints; adapters are trimmed per module"))
        choices.append(Choice(setting, where, override.layers, override.match))
    return choices


def _asked(recipe: Recipe) -> Iterator[tuple[str, str, list[tuple[str, Mapping[str, Any]]], Override]]:
    """For each override and then the recipe: the method, where it is set, its parameters, and the override."""
    general = ("recipe: parameters", recipe.parameters)
    for place, override in enumerate(recipe.overrides):
        where = f"overrides[{place}]"
        layers = [general, (f"recipe: {where}", override.parameters)]
        yield override.merge_method or recipe.merge_method, where, layers, override
    yield recipe.merge_method, "merge_method", [general], Override()


def _refuse_unlisted(recipe: Recipe, methods: Collection[str], base: Collection[int]) -> None:
    """Refuse an average with a base_model that is not among its models: if it has a weight, mergekit merges the base
    too.
    """
    row = METHODS[recipe.merge_method]
    averages = row.on == "weights" and row.parameter("weight") is not None
    reads_base = any(METHODS[method].reads_base for method in methods)
    weighs = recipe.parameters.get("weight", UNREAD) is not UNREAD and "models" not in recipe.unread
    if averages and weighs and recipe.base_model and not base and not reads_base:
        refuse(
            RecipeError(
                f"{recipe.merge_method} does not read base_model, whereas mergekit merges '{recipe.base_model}' in "
                "with the weight of parameters. List it among models to merge it, or remove base_model"
            )
        )
