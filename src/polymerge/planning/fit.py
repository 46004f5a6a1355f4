"""Check that the models fit the template and the recipe fits its models; one error per kind, not per tensor."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

from polymerge.checkpoints.files import class_names
from polymerge.errors import PolymergeError, RecipeError, did_you_mean, refuse
from polymerge.families import family_of, nearest
from polymerge.families.registry import GENERIC
from polymerge.families.resolve import apart
from polymerge.families.rules import text_layer
from polymerge.planning.model import EMBEDDING, HEAD, Model, own_name
from polymerge.recipe.overrides import Choice, matches
from polymerge.recipe.recipe import Recipe

__all__ = [
    "Misfits",
    "common_parts",
    "joinable",
    "layer_pattern",
    "misnamed",
    "needed_all_the_same",
    "unmatched",
]

_FEW = 3
"""Maximum number of names in an error."""

_LAYER = re.compile(r"(?<=\blayers\.)\d+(?=\.)|(?<=\bblocks\.)\d+(?=\.)")
_EXPERT = re.compile(r"(?<=\bexperts\.)\d+(?=\.)")
_NORM = "text.norm.weight"


def layer_pattern(name: str) -> str:
    """The name with its layer and expert numbers blanked: `text.layers.3.norm.weight` -> `text.layers.{i}.norm...`."""
    return _EXPERT.sub("{e}", _LAYER.sub("{i}", name))


@dataclass
class Misfits:
    """Tensors that do not fit, grouped by pattern so that each kind is one problem."""

    missing: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))
    extra: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))
    shapes: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))
    dtypes: dict[tuple[str, str, str], list[str]] = field(default_factory=lambda: defaultdict(list))
    ignored: set[tuple[str, str]] = field(default_factory=set)
    deep: set[str] = field(default_factory=set)
    wide: set[str] = field(default_factory=set)

    def problems(self, template: str) -> Iterable[PolymergeError]:
        """One error per kind of misfit."""
        for (label, pattern), found in self.missing.items():
            yield RecipeError(
                f"{pattern}{_count(found)}: template '{template}' has it, '{label}' does not"
                f"{' because the recipe ignores it' if (label, pattern) in self.ignored else ''}. If it may stay the "
                "template's, name it in exclude"
            )
        for (label, pattern), found in self.extra.items():
            yield RecipeError(
                f"{pattern}{_count(found)}: '{label}' has it, template '{template}' does not, so it would be lost. "
                "If that is intended, name it in exclude"
            )
        for (_, pattern), found in self.shapes.items():
            yield RecipeError(f"{pattern}{_count(found)}: {found[0].partition('|')[2]}")
        held: dict[tuple[str, str], list[str]] = defaultdict(list)
        for (label, dtype, pattern), found in self.dtypes.items():
            held[label, dtype].append(f"{pattern}{_count(found)}")
        for (label, dtype), kinds in held.items():
            one = len(kinds) == 1
            what = ", ".join(kinds[:_FEW]) + (f" and {len(kinds) - _FEW} more kinds" if len(kinds) > _FEW else "")
            yield RecipeError(
                f"{what}: '{label}' holds {'it' if one else 'them'} as {dtype}, which cannot be merged "
                f"(F64, F32, F16 and BF16 can). Name {'it' if one else 'them'} in exclude to keep the template's"
            )

    def note_missing(self, model: Model, name: str) -> None:
        """Note that the template has a tensor to merge and `model` does not."""
        if not (model.label in self.deep and name.startswith("text.layers.")):
            self.missing[model.label, layer_pattern(name)].append(name)
            if name in model.unread:
                self.ignored.add((model.label, layer_pattern(name)))

    def note_extra(self, model: Model, name: str) -> None:
        """Note that `model` has a tensor in a merged part and the template does not."""
        if not (model.label in self.deep and name.startswith("text.layers.")):
            self.extra[model.label, layer_pattern(name)].append(name)

    def note_shape(self, model: Model, found: str, template: Model, name: str) -> None:
        """Note that the template and `model` (as `found`) have a tensor in different shapes."""
        if model.label in self.wide and name.startswith("text."):
            return
        theirs, ours = list(model.shape(found)), list(template.shape(name))
        text = f"{name}|'{model.label}' is {theirs}, template '{template.label}' is {ours}"
        self.shapes[model.label, layer_pattern(name)].append(text)

    def note_dtype(self, model: Model, name: str) -> None:
        """Note that a tensor to merge has a dtype without arithmetic."""
        dtype = model.entries[own_name(model.tensors[name])].dtype
        self.dtypes[model.label, dtype, layer_pattern(name)].append(name)


def common_parts(models: Sequence[Model]) -> frozenset[str]:
    """The parts that models can be merged in: all common parts within a family, only the text tower across families.

    Vision towers and projectors of different families are different networks even where some names agree.
    """
    common = frozenset.intersection(*(model.parts for model in models))
    families = {(model.family.name, model.by and model.family.architectures) for model in models}
    return common if len(families) == 1 else common & {"text"}


def joinable(template: Model, model: Model, parts: frozenset[str] | None, misfits: Misfits) -> None:
    """Refuse two models that cannot be merged at all: family, depth, width."""
    if template.generic != model.generic:
        stranger, other = (template, model) if template.generic else (model, template)
        if nearest(stranger.checkpoint.config) is not GENERIC:
            refuse(_nearly_known(stranger, other))
            return
        kind = stranger.checkpoint.config.get("model_type")
        what = f"model_type '{kind}'" if kind else "no config.json with a model_type"
        refuse(
            RecipeError(
                f"'{stranger.label}' has {what}, which no family table covers, so it only merges with models of "
                f"identical tensor names; '{other.label}' is of family {other.family.name}. Set `family:` for the "
                "model if one of `polymerge families` has its names, or add a table to src/polymerge/families/tables/"
                f"{stranger.why_generic}"
            )
        )
        return
    if template.generic or (parts is not None and "text" not in parts):
        return
    if template.depth != model.depth:
        misfits.deep.add(model.label)
        refuse(
            RecipeError(
                f"depth: '{model.label}' has {model.depth} text layers, template '{template.label}' has "
                f"{template.depth}. Only text towers of equal depth can be merged: choose another model, or "
                "`parts` without text"
            )
        )
    if _NORM in template.tensors and _NORM in model.tensors and template.shape(_NORM) != model.shape(_NORM):
        misfits.wide.add(model.label)
        refuse(
            RecipeError(
                f"width: the text tower of '{model.label}' is {prod(model.shape(_NORM))} wide, that of template "
                f"'{template.label}' {prod(template.shape(_NORM))} ({_NORM}). Only text towers of equal width can be "
                "merged: choose another model, or `parts` without text"
            )
        )


def _nearly_known(stranger: Model, other: Model) -> RecipeError:
    """The error for a model whose model type belongs to a family but whose class and tensors do not."""
    config = stranger.checkpoint.config
    family = family_of(config, nearest(config).name)
    unknown = [name for name in stranger.stored if not family.explains([name])]
    few = ", ".join(f"'{name}'" for name in unknown[:_FEW]) + (", ..." if len(unknown) > _FEW else "")
    globs = apart(unknown, set(stranger.stored) - set(unknown))
    named = ", ".join(class_names(config))
    ignore = ", ".join(f'"{glob}"' for glob in globs[:_FEW])
    return RecipeError(
        f"'{stranger.label}': its config.json names the class {named}, which no family table covers, and family "
        f"'{family.name}' of its model_type does not explain {len(unknown)} of its {len(stranger.stored)} tensors: "
        f"{few}. '{other.label}' is of family {other.family.name}. Leave out tensors of other kinds with `ignore: "
        f"[{ignore}]`, or set `family:` for it if another one of `polymerge families` has its names"
    )


def misnamed(template: Model) -> Iterator[PolymergeError]:
    """The error for a template whose config.json, which the output inherits, names a class of another family."""
    if template.misnamed:
        yield RecipeError(
            f"template '{template.label}': its config.json, which the output inherits, names {template.other}, and its "
            f"tensors are those of family {template.family.name}: the output would not load. Put the config.json of "
            f"such a model there ({' or '.join(template.family.architectures)}), or choose another template"
        )


def needed_all_the_same(template: Model, models: Sequence[Model]) -> Iterator[PolymergeError]:
    """The error for ignored tensors of the template without which the output would not load.

    A tensor that a rule explains is needed unless a model with that part of the family has none, or its layer is beyond
    those that the config counts.
    """
    others = [model for model in dict.fromkeys(models) if model is not template]
    needed = []
    for name in sorted(template.unread):
        part, layer, layers = name.partition(".")[0], text_layer(name), template.tower.layers
        like = [
            model
            for model in others
            if model.family.name == template.family.name or (part == "text" and part in model.parts)
        ]
        beyond = layer is not None and layers is not None and layer >= layers
        if not beyond and (not like or any(model.find(name) or name in model.unread for model in like)):
            needed.append(name)
    kinds = dict.fromkeys(map(layer_pattern, needed))
    if kinds:
        yield RecipeError(
            f"recipe: ignore: {', '.join(list(kinds)[:_FEW])}{', ...' if len(kinds) > _FEW else ''}: the output would "
            f"be without {_times(needed)} of template '{template.label}', which its architecture needs. Use exclude, "
            "with canonical names, to keep the template's"
        )


def _times(found: Sequence[str]) -> str:
    return f"{len(found)} tensors" if len(found) > 1 else "this tensor"


def _count(found: list[str]) -> str:
    return f" ({len(found)} tensors)" if len(found) > 1 else ""


def unmatched(
    recipe: Recipe, choices: Sequence[Choice], template: Model, readers: Sequence[Model]
) -> Iterator[RecipeError]:
    """An error for each glob of a recipe that matches no tensor, and for layers beyond the template's depth."""
    models = (template, *readers)
    every = {name for model in models for name in (*model.tensors, *model.unread)} | {EMBEDDING, HEAD}
    said = [(where, glob) for where in ("exclude", "overflow") for glob in getattr(recipe, where)]
    said += [("overrides", choice.match) for choice in choices if choice.match]
    for where, glob in said:
        if any(matches(name, glob) for name in every):
            continue
        if any(matches(name, glob) for model in models for name in model.entries):
            yield RecipeError(
                f"recipe: {where}: '{glob}' matches stored names but no canonical one. Tensors that are not part of a "
                "model are "
                f'left out by `ignore: ["{glob}"]`'
            )
            continue
        hint = did_you_mean(glob, {re.sub(r"(?<=\.)[0-9]+(?=\.)", "*", name) for name in every})
        yield RecipeError(
            f"recipe: {where}: '{glob}' matches no tensor; globs are matched against entire canonical names"
            f"{f'.{hint}' if hint.startswith(' Did') else f', such as {min(every)}'}"
        )
    has_layers = template.layers
    if recipe.layers not in (None, has_layers):
        yield RecipeError(
            f"recipe: layers: it counts on {recipe.layers} layers, and template '{template.label}' has {has_layers}. "
            "Layers stay in place here: none can be dropped or added"
        )
        return
    for choice in choices:
        if choice.layers and choice.layers[1] >= template.depth:
            has = f"layers 0-{template.depth - 1}" if template.depth else "no text layers"
            yield RecipeError(
                f"recipe: {choice.where}: layers {choice.layers[0]}-{choice.layers[1]}, but template "
                f"'{template.label}' has {has}"
            )


def unmatched_filters(choices: Sequence[Choice], template: Model) -> Iterator[str]:
    """A sentence on each filter that is part of no tensor's name: mergekit, too, lets its value count for nothing."""
    for choice in choices:
        for part in choice.schedule.filters if choice.schedule else ():
            if not any(part in name for name in template.layout):
                yield (
                    f"filter '{part}' is part of no tensor's name in template '{template.label}', such as "
                    f"{next(iter(template.layout), 'none')}, so its value counts for nothing"
                )
