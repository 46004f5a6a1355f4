"""The adapters of a recipe, opened: what they are, whether they belong together, and how their names are joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from polymerge.checkpoint.adapter import Adapter, open_adapter
from polymerge.checkpoint.hub import locate
from polymerge.checkpoint.jsontext import parse_object
from polymerge.errors import PolymergeError, RecipeError, Refused
from polymerge.families import family_of
from polymerge.families.generic import GENERIC
from polymerge.mapping import Family
from polymerge.methods.table import METHODS
from polymerge.planning.data import Input, LeftOut
from polymerge.planning.inputs import Model, open_each, tensors_digest
from polymerge.recipe import Recipe

__all__ = ["Opened", "base_of", "check_bases", "open_adapters", "skipped", "summaries"]


@dataclass(frozen=True)
class Opened:
    """The adapters of a recipe in its order, their labels, and how their names become canonical."""

    adapters: tuple[Adapter, ...]
    labels: tuple[str, ...]
    template: int
    family: Family

    def key(self, parameter: str) -> str:
        """What joins the parameter `parameter` of one adapter with that of another: its canonical name."""
        return "+".join(self.family.canonical(parameter)) or parameter


def open_adapters(recipe: Recipe, labels: Sequence[str], problems: list[PolymergeError]) -> Opened | None:
    """Open every adapter of a recipe; None, with the problems said, where one cannot be used."""
    adapters = []
    for entry in recipe.models:
        try:
            adapters.append(open_adapter(entry.model, locate(entry.model)))
        except Refused as refused:
            problems.extend(refused.problems)
        except PolymergeError as error:
            problems.append(error)
    sources = [entry.model for entry in recipe.models]
    template = 0
    if recipe.template is not None and recipe.template not in sources:
        problems.append(RecipeError(f"template '{recipe.template}' has to be one of the adapters in models"))
    elif recipe.template is not None:
        template = sources.index(recipe.template)
    if len(adapters) < len(sources) or not adapters:
        return None
    return Opened(tuple(adapters), tuple(labels), template, _family(recipe, adapters))


def _family(recipe: Recipe, adapters: Sequence[Adapter]) -> Family:
    """The family whose names the modules have: that of the base's config, as far as one is at hand."""
    for adapter in adapters:
        if adapter.model_config:
            return family_of(adapter.model_config)
    bases = [recipe.base_model, *(adapter.config.get("base_model_name_or_path") for adapter in adapters)]
    for base in bases:
        config = Path(str(base)).expanduser() / "config.json" if base else None
        if config is not None and config.is_file():
            return family_of(parse_object(config.read_bytes(), str(config), unique_keys=False))
    return GENERIC


def base_of(recipe: Recipe, problems: list[PolymergeError]) -> Model | None:
    """The base, where full weights are merged as deltas to it."""
    extra = METHODS.get(str(recipe.parameters.get("extra")))
    if extra is None or extra.on != "deltas":
        return None
    if recipe.base_model is None:
        problems.append(RecipeError(f"extra: {extra.name} works on deltas of the full weights and needs base_model"))
        return None
    return next(iter(open_each([recipe.base_model], problems)), None)


def check_bases(recipe: Recipe, opened: Opened, problems: list[PolymergeError]) -> None:
    """Adapters of different bases do not belong together; their configs say of which they are."""
    labelled = list(zip(opened.labels, opened.adapters, strict=True))
    if recipe.base_model is None:
        named = {label: str(adapter.config.get("base_model_name_or_path") or "") for label, adapter in labelled}
        if len({Path(base).name.casefold() for base in named.values() if base}) > 1:
            listed = ", ".join(f"'{label}' of {base}" for label, base in named.items() if base)
            problems.append(
                RecipeError(f"the adapters are of different bases: {listed}. If these are one model, say base_model")
            )
    kinds = {label: one.model_config.get("model_type") for label, one in labelled if one.model_config}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"'{label}' is for a {kind}" for label, kind in kinds.items())
        problems.append(RecipeError(f"the adapters are of different families: {listed}"))


def summaries(opened: Opened) -> list[Input]:
    """What the plan records of each adapter."""
    return [
        Input(
            label=label,
            source=adapter.source,
            path=str(adapter.folder),
            family=opened.family.name,
            tensors=len(adapter.entries),
            size=sum(entry.nbytes for entry in adapter.entries),
            headers=tensors_digest(adapter.entries),
        )
        for label, adapter in zip(opened.labels, opened.adapters, strict=True)
    ]


def skipped(opened: Opened) -> list[LeftOut]:
    """What the files hold that is no part of the adapters."""
    return [
        LeftOut(place, name, reason)
        for place, adapter in enumerate(opened.adapters)
        for name, reason in adapter.skipped.items()
    ]
