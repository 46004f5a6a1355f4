"""Choose the method and parameters of each tensor: the recipe's, or those of the first override that matches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from polymerge.errors import RecipeError, refuse
from polymerge.families.rules import text_layer, without_branch
from polymerge.methods.table import ADAPTERS, METHODS
from polymerge.recipe.parameters import UNREAD, Layer, Setting, resolve
from polymerge.recipe.recipe import ModelEntry, Recipe
from polymerge.recipe.schedule import Schedule, schedule_of

__all__ = ["Choice", "Key", "choices_of", "choices_of_adapters", "key_of", "matches", "rest_of", "settings_of"]

Key = tuple[str, str, tuple[tuple[str, object], ...]]
"""What equal settings are recognised by."""


@dataclass(frozen=True)
class Choice:
    """A setting and its scope: the tensors of some text layers, those that a glob matches, or all.

    setting   of all tensors in its scope, unless it has a schedule: then of what is in no layer
    schedule  gives the settings of others, if its numbers change by depth
    own       the indices of the models whose values count; None for all
    """

    setting: Setting
    where: str
    layers: tuple[int, int] | None = None
    match: str | None = None
    schedule: Schedule | None = field(default=None, compare=False)
    own: tuple[int, ...] | None = field(default=None, compare=False)

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

    def at(self, canonical: str, stored: str, depth: int) -> Setting:
        """The setting of a tensor that it covers.

        stored  its name in the template, which filters are parts of
        depth   the number of layers of the text tower

        refuses what cannot be resolved there.
        """
        if self.schedule is None:
            return self.setting
        setting = self.schedule.at(text_layer(canonical), stored, depth)
        return setting if self.own is None else setting.of(self.own)

    def of(self, places: Sequence[int]) -> Choice:
        """The choice restricted to some models, by index."""
        return Choice(self.setting.of(places), self.where, self.layers, self.match, self.schedule, tuple(places))


def key_of(setting: Setting) -> Key:
    """A key by which equal settings are recognised."""
    return setting.method, setting.schedule, tuple(sorted(setting.parameters.items()))


def rest_of(setting: Setting, models: int) -> Setting:
    """How a merge of whole matrices treats a tensor that is none: a method on matrices takes the mean of the deltas,
    each times its weight, or the first model's delta; what another one makes is not calibrated.

    models  their number
    """
    if setting.row.on != "matrices":
        plain = {name: value for name, value in setting.parameters.items() if setting.row.parameter(name)}
        return Setting(setting.method, plain, setting.on_base)
    weight = setting.parameters.get("weight", (1.0,) * models)
    if setting.row.rest == "first":
        shares = (weight[0], *(0.0 for _ in weight[1:]))
    else:
        shares = tuple(number / models for number in weight)
    scale = setting.parameters.get("scale", 1.0)
    return Setting("task_arithmetic", {"weight": shares, "normalize": False, "scale": scale}, setting.on_base)


def settings_of(choices: Sequence[Choice], models: int) -> dict[Key, Setting]:
    """The distinct settings that merge something, then those for what is no matrix where a method works on these; but
    for settings that change by depth, which follow from where they are used.

    models  their number
    """
    plain = [choice for choice in choices if choice.schedule is None and not choice.setting.row.copies]
    own = {choice.key: choice.setting for choice in plain}
    rests = [rest_of(setting, models) for setting in own.values() if setting.whole]
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
    on_base = recipe.base_model is not None
    choices = [
        _choice(partial(resolve, method, base=base, on_base=on_base), method, layers, per_model, labels, asked)
        for method, layers, asked in _asked(recipe)
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
    for method, layers, asked in _asked(recipe):
        row = METHODS[method]
        if not row.takes_adapters:
            refuse(RecipeError(f"{method} works on checkpoints, not on adapters"))
        more = tuple(one for one in ADAPTERS if one.name != "space" or row.entrywise)
        if not row.entrywise and not row.copies and any("space" in given for given in (layers[-1][1], *per_model)):
            refuse(RecipeError(f"recipe: {asked.where}: {method} merges factors in its own way and takes no space"))
        resolving = partial(resolve, method, more=more, beside=beside)
        choice = _choice(resolving, method, layers, per_model, labels, asked)
        if choice.setting.parameters.get("trim") == "model":
            refuse(RecipeError(f"{method}: trim: model is for checkpoints; adapters are trimmed per module"))
        choices.append(choice)
    return choices


@dataclass(frozen=True)
class _Asked:
    """Where in a recipe a setting is asked for, and its scope."""

    where: str
    layers: tuple[int, int] | None = None
    match: str | None = None


def _choice(
    resolving: Callable[..., Setting],
    method: str,
    layers: Sequence[Layer],
    per_model: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    asked: _Asked,
) -> Choice:
    resolving = partial(resolving, labels=labels)
    schedule = schedule_of(resolving, METHODS[method], layers, per_model, asked.layers, labels)
    setting = resolving(layers, per_model) if schedule is None else schedule.outside()
    return Choice(setting, asked.where, asked.layers, asked.match, schedule)


def _asked(recipe: Recipe) -> Iterator[tuple[str, list[Layer], _Asked]]:
    """For each override and then the recipe: the method, its parameters, and where it is set for what."""
    general = ("recipe: parameters", recipe.parameters)
    for place, override in enumerate(recipe.overrides):
        where = f"overrides[{place}]"
        layers = [general, (f"recipe: {where}", override.parameters)]
        yield override.merge_method or recipe.merge_method, layers, _Asked(where, override.layers, override.match)
    yield recipe.merge_method, [general], _Asked("merge_method")


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
