"""Open the adapters of a recipe, check that they belong together, and map their parameter names to canonical ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, replace
from pathlib import Path

from polymerge.checkpoints.adapter import Adapter, open_adapter
from polymerge.checkpoints.files import read_config
from polymerge.checkpoints.folder import adapter_alone
from polymerge.checkpoints.hub import locate
from polymerge.checkpoints.pairs import Pair
from polymerge.checkpoints.tensor_info import listed
from polymerge.errors import PolymergeError, RecipeError, collecting, refuse
from polymerge.families import FAMILIES, family_of
from polymerge.families.expressions import Concat, shape_of
from polymerge.families.registry import GENERIC
from polymerge.families.rules import Family
from polymerge.methods.table import METHODS
from polymerge.paths import exists, given_path
from polymerge.planning.adapter_places import Parameters, Reading, named_family, reading_of
from polymerge.planning.inputs import open_each
from polymerge.planning.model import Model, digests_beside, headers_digest, settings_digest
from polymerge.planning.plan import Input, LeftOut
from polymerge.recipe.recipe import Recipe

__all__ = [
    "Opened",
    "check_against_base",
    "check_bases",
    "check_beside",
    "check_both_kinds",
    "check_convolutions",
    "open_adapters",
    "open_base",
    "skipped",
    "summaries",
]


@dataclass(frozen=True)
class Opened:
    """The opened adapters of a recipe, in its order, with their labels and how each one's names become canonical."""

    adapters: tuple[Adapter, ...]
    labels: tuple[str, ...]
    template: int
    readings: tuple[Reading, ...]

    def key(self, place: int, parameter: str) -> str:
        """Return the canonical name that joins a parameter of the adapter at `place` with those of the others."""
        return self.readings[place].joint(parameter) or parameter

    def module(self, place: int, module: str) -> str:
        """Return the canonical name that joins a module of the adapter at `place` with those of the others."""
        pair = self.adapters[place].pairs.get(module)
        return self.key(place, pair.parameter if pair else f"{module}.weight").removesuffix(".weight")

    def names(self, place: int) -> dict[str, str]:
        """Map canonical names to an adapter's own names, for every parameter that it changes."""
        return {self.key(place, name): name for name in self.adapters[place].parameters}

    def with_names_of_today(self) -> tuple[Opened, str]:
        """Choose as template an adapter whose names current PEFT finds, if the first has an older layout; with a note
        on it.

        transformers 4.52 put what a multimodal model holds under `model.`, its text tower under
        `model.language_model.`. Of an adapter with the names of before, as of Qwen2.5-VL, PEFT may load nothing today,
        and says so in a warning only. The template stays the first where another one lacks anything, for names are not
        translated back.
        """
        first = self.names(self.template)
        if _of_today(first):
            return self, ""
        every = {name for place in range(len(self.adapters)) for name in self.names(place)}
        for place in range(len(self.adapters)):
            names = self.names(place)
            other = next((name for name in names if first.get(name, names[name]) != names[name]), None)
            if other is not None and _of_today(names) and set(names) == every:
                said = (
                    f"'{self.labels[self.template]}' names modules as transformers did before 4.52 ({first[other]}), "
                    f"which PEFT may not find today; the output has the names, the config and the files of "
                    f"'{self.labels[place]}' ({names[other]}). To have the others, say template: "
                    f"'{self.adapters[self.template].source}'"
                )
                return replace(self, template=place), said
        return self, ""


def _of_today(names: Mapping[str, str]) -> bool:
    """Return whether the parameters of a multimodal model, by canonical name, are named as in transformers >= 4.52."""
    return all(
        own.startswith("model.language_model." if canonical.startswith("text.") else "model.")
        for canonical, own in names.items()
        if not canonical.startswith("text.lm_head.")
    )


def open_adapters(recipe: Recipe, labels: Sequence[str]) -> Opened | None:
    """Open every adapter of a recipe; return None, with the problems refused, if one cannot be used."""
    adapters = []
    for entry in recipe.models:
        with collecting():
            adapters.append(open_adapter(entry.model, locate(entry.model)))
    sources = [entry.model for entry in recipe.models]
    template = 0
    if recipe.template is not None and recipe.template not in sources:
        refuse(RecipeError(f"template '{recipe.template}' has to be one of the adapters in models"))
    elif recipe.template is not None:
        template = sources.index(recipe.template)
    if len(adapters) < len(sources) or not adapters:
        return None
    families = _families(recipe, adapters)
    readings = [reading_of(adapter.parameters, (*named_family(adapter), *families)) for adapter in adapters]
    return Opened(tuple(adapters), tuple(labels), template, tuple(readings))


def _families(recipe: Recipe, adapters: Sequence[Adapter]) -> list[Family]:
    """The families that module names may follow, from the configs at hand: the base's and the adapters'."""
    config = given_path(recipe.base_model) / "config.json" if recipe.base_model else None
    found = [family for adapter in adapters if adapter.model_config for family in named_family(adapter)]
    if config is not None and config.is_file():
        found.append(family_of(read_config(config)))
    found += [family for adapter in adapters for family in named_family(adapter)]
    return found or [GENERIC]


def open_base(recipe: Recipe) -> Model | None:
    """Open the base if it is needed for deltas of full weights, or for its headers if it is a local folder.

    A base that cannot be merged (a quantized one, say) and is not needed is only recorded.
    """
    extra = METHODS.get(str(recipe.parameters.get("extra")))
    needed = extra is not None and extra.on == "deltas"
    if recipe.base_model is None:
        if extra is not None and needed:
            refuse(RecipeError(f"extra: {extra.name} works on deltas of the full weights and needs base_model"))
        return None
    if needed:
        return next(iter(open_each([recipe.base_model])), None)
    if not exists(recipe.base_model):
        return None
    try:  # in a context of its own, in which what is wrong with it is raised, and not gathered with the recipe's
        return Context().run(open_each, [recipe.base_model])[0]
    except PolymergeError:
        return None


def check_bases(recipe: Recipe, opened: Opened) -> None:
    """Refuse adapters that were trained on different bases, according to their configs."""
    labelled = list(zip(opened.labels, opened.adapters, strict=True))
    if recipe.base_model is None:
        named = {label: str(adapter.config.get("base_model_name_or_path") or "") for label, adapter in labelled}
        if len({Path(base).name.casefold() for base in named.values() if base}) > 1:
            listed = ", ".join(f"'{label}' of {base}" for label, base in named.items() if base)
            refuse(
                RecipeError(
                    f"the adapters are of different bases: {listed}. If these are the same model, set base_model"
                )
            )
    kinds = {label: one.model_config.get("model_type") for label, one in labelled if one.model_config}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"'{label}' is for a {kind}" for label, kind in kinds.items())
        refuse(RecipeError(f"the adapters are of different families: {listed}"))


def check_against_base(base: Model, opened: Opened) -> None:
    """Check against the headers of the base that it has every tensor that the adapters change."""
    parameters = Parameters(base)
    for label, adapter in zip(opened.labels, opened.adapters, strict=True):
        reading = parameters.reading(adapter)
        lacking: dict[str, list[Pair]] = {}
        for pair in adapter.pairs.values():
            if (have := _instead_of_place(parameters, reading, adapter, pair)) is not None:
                lacking.setdefault(have, []).append(pair)
        for have, (pair, *others) in lacking.items():
            more = f" (and {len(others)} more modules)" if others else ""
            refuse(
                RecipeError(
                    f"base_model '{base.checkpoint.source}' (family {base.family.name}) has no {pair.module} of "
                    f"{list(pair.shape)} (out, in), which '{label}' is for{more}{have}. Name the base that it was "
                    "trained on"
                )
            )


def _instead_of_place(parameters: Parameters, reading: Reading, adapter: Adapter, pair: Pair) -> str | None:
    """Return what the base has in place of the weight that a pair changes: None if it has that weight, "" if nothing.

    A head may be its embedding, and then has no name; an adapter may have the weight that its pair changes with it.
    """
    name = pair.parameter
    if pair.experts:
        places = parameters.places_of_experts(pair.module, pair.experts, reading)
        lying = places and Concat(tuple(parameters.read(block) for block in places[0]))
        have = lying and shape_of(lying, parameters.base.shapes)
        fits = have and have[-2:] in (pair.shape, pair.shape[::-1]) and (len(have) == 2 or have[0] == pair.experts)
        return None if fits else f": {places[0][0][0]} is {list(have)}" if places and have else ""
    place = parameters.place(name, reading)
    if place is None:
        return None if pair.module.rpartition(".")[2] == "lm_head" else ""
    shapes = {own: entry.shape for own, entry in parameters.base.entries.items()}
    lying = Concat(tuple(parameters.read(block) for block in place))
    have = adapter.non_lora[name].shape if name in adapter.non_lora else shape_of(lying, shapes)
    wanted = {pair.stored} if pair.embedding else {pair.shape, pair.shape[::-1]}  # a config tells of its last one only
    return None if have in wanted else f": {place[0][0]} is {list(have)}"


def check_convolutions(opened: Opened) -> None:
    """Refuse factors of convolutions, which are only folded."""
    for label, adapter in zip(opened.labels, opened.adapters, strict=True):
        if names := [module for module, pair in adapter.pairs.items() if pair.kernel]:
            refuse(
                RecipeError(
                    f"'{label}': {listed(names)}: factors of a convolution, which are not merged by themselves. Write "
                    "BASE+ADAPTER to merge full models"
                )
            )


def check_both_kinds(opened: Opened) -> None:
    """Refuse modules for which one adapter has LoRA factors or trained rows and another the full weight."""
    seen: dict[str, tuple[str, str]] = {}
    for place, (label, adapter) in enumerate(zip(opened.labels, opened.adapters, strict=True)):
        kinds = dict.fromkeys(adapter.non_lora, "has trained it in full")
        kinds |= dict.fromkeys(adapter.tokens, "has trained rows of it")
        kinds |= dict.fromkeys((pair.parameter for pair in adapter.pairs.values()), "has LoRA on it")
        for parameter, kind in kinds.items():
            canonical = opened.key(place, parameter)
            first, other = seen.setdefault(canonical, (label, kind))
            if kind != other:
                refuse(
                    RecipeError(
                        f"{canonical}: '{first}' {other}, '{label}' {kind}. Fold both into their base and merge the "
                        "models"
                    )
                )


def check_beside(opened: Opened) -> None:
    """Refuse full weights from files that are not PEFT's own if no family knows their names."""
    families = [reading.family for reading in opened.readings]
    if GENERIC in families:
        return  # its names are not known
    tables = [*families, *(table for table in FAMILIES.values() if table is not GENERIC)]
    for label, adapter in zip(opened.labels, opened.adapters, strict=True):
        for file in adapter.beside:
            held = [parameter for parameter, entry in adapter.non_lora.items() if entry.file == file]
            unknown = [name for name in held if not any(table.joint(name) or table.is_buffer(name) for table in tables)]
            if unknown:
                refuse(
                    RecipeError(
                        f"'{label}': {file}: {listed(unknown)} have names that no model family has, so their purpose "
                        "is unknown. Move the file out of the folder if it is not part of the adapter"
                    )
                )


def summaries(opened: Opened) -> list[Input]:
    """The plan's record of each adapter."""
    return [
        Input(
            label=label,
            source=adapter.source,
            path=str(adapter.folder),
            family=reading.family.name,
            tensors=len(adapter.entries),
            size=sum(entry.nbytes for entry in adapter.entries),
            headers=headers_digest(checkpoint),
            settings=settings_digest(checkpoint),
            beside=digests_beside(checkpoint),
            files=dict(adapter.became),
            kind="adapter",
            opened=checkpoint,
        )
        for label, adapter, reading in zip(opened.labels, opened.adapters, opened.readings, strict=True)
        for checkpoint in (adapter_alone(adapter),)
    ]


def skipped(opened: Opened) -> list[LeftOut]:
    """Tensors in the adapters' files that are not part of the adapters."""
    return [
        LeftOut(place, name, reason)
        for place, adapter in enumerate(opened.adapters)
        for name, reason in adapter.skipped.items()
    ]
