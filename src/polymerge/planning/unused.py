"""Tensors of the inputs that a plan does not use, each with the reason, and other notes on the plan."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from polymerge.checkpoints.files import class_names
from polymerge.checkpoints.folder import ADAPTER
from polymerge.checkpoints.tensor_info import listed
from polymerge.families import quantization_method
from polymerge.families.expressions import Expr, names_read
from polymerge.families.lent import lender
from polymerge.methods.table import METHODS
from polymerge.planning.inputs import Models
from polymerge.planning.model import EMBEDDING, HEAD, Model, part_of
from polymerge.planning.plan import IGNORED, LeftOut, Piece, Step
from polymerge.planning.vocabulary import vocabulary_notes
from polymerge.recipe.overrides import matches
from polymerge.recipe.parameters import Setting, without_effect
from polymerge.recipe.recipe import Recipe

__all__ = ["UnusedTensors", "drops_at_random", "has_no_effect", "left_out_of_files", "measures_tensors", "notes"]
__all__ += ["partly_kept"]


@dataclass
class UnusedTensors:
    """The reasons why tensors of the inputs are unused: noted during planning, reported once the steps are known.

    parts    the merged parts; None if names have no parts
    kept     canonical names for which the output keeps the template's tensor, each with the reason
    surplus  (label, canonical name) of tensors that the template lacks, each with the reason why it may be left out
    """

    template: Model
    parts: frozenset[str] | None
    kept: dict[str, str] = field(default_factory=dict)
    surplus: dict[tuple[str, str], str] = field(default_factory=dict)

    def left_out(
        self, inputs: Sequence[Model], models: Sequence[Model], base: Model | None, steps: Sequence[Step]
    ) -> tuple[LeftOut, ...]:
        """Every tensor of an input that no step reads, each with its reason."""
        places = [inputs.index(model) for model in models]
        own_base = None if base is None else inputs.index(base)
        own = inputs.index(self.template)
        used = {(own, step.name) for step in steps}
        for step in steps:
            for piece in step.pieces:
                reads = _reads(piece, places if piece.setting is not None else (own,), own_base)
                used.update(lender(own, place) for place, expr in reads for own in names_read(expr))
        left_out: list[LeftOut] = []
        for place, model in enumerate(inputs):
            kept = {model.find(canonical): why for canonical, why in reversed(self.kept.items())}
            left_out += [
                LeftOut(place, own, self._why(model, own, kept)) for own in model.entries if (place, own) not in used
            ]
        return tuple(left_out)

    def _why(self, model: Model, own: str, kept: Mapping[str | None, str]) -> str:
        """Why no step reads a tensor; `kept` is keyed by the model's own names."""
        if own in model.ignored:
            return IGNORED
        if own in model.fp8.dropped:
            return model.fp8.dropped[own]
        own = model.fp8.weights.get(own, own)  # scales are left out with their weight
        if own in model.adapted and own not in names_read(model.adapted[own]):
            return "its adapter has another in its place"
        if own in model.checkpoint.skipped:
            return model.checkpoint.skipped[own]
        if own in model.buffers:
            return model.family.why_unmerged(own)
        if own.startswith(ADAPTER) and not model.held(own):
            return "its base ties head and embedding, and its adapter keeps them so: it is the other"
        reasons = []
        for name in model.held(own):
            if (model.label, name) in self.surplus:
                reasons.append(self.surplus[model.label, name])
            elif name in kept:
                reasons.append(f"the template's is kept: {kept[name]}")
            elif name == HEAD and self.template.ties_head:
                reasons.append("the template ties its head to its embedding")
            elif self.parts is not None and part_of(name) not in self.parts:
                reasons.append(f"part {part_of(name)} is not merged")
        return "; ".join(dict.fromkeys(reasons)) or "the method does not read it"


def _reads(piece: Piece, models: Sequence[int], base: int | None) -> Iterator[tuple[int, Expr]]:
    """The inputs that a piece reads, each with its expression; `models` are those of a piece that names none."""
    yield from zip(piece.inputs or models, piece.reads, strict=True) if piece.reads else ()
    if base is not None and piece.base is not None:
        yield base, piece.base


def partly_kept(kept: Mapping[str, str], dtype: str) -> str:
    """The reason reported for the parts of a merged tensor that stay the template's.

    kept   their canonical names, each with the reason
    dtype  the dtype that they are written in, if it is not the template's
    """
    reasons = []
    for reason in dict.fromkeys(kept.values()):
        first, *more = (name for name, why in kept.items() if why == reason)
        reasons.append(f"{first}{f' and {len(more)} more are' if more else ' is'} the template's: {reason}")
    return "; ".join(reasons) + (f" (as {dtype}, like the rest)" if reasons and dtype else "")


def _one_is_excluded(recipe: Recipe) -> bool:
    return len({any(matches(name, glob) for glob in recipe.exclude) for name in (EMBEDDING, HEAD)}) == 2


def notes(
    recipe: Recipe,
    models: Models,
    base: Model | None,
    settings: Collection[Setting],
    steps: Sequence[Step],
    inputs: Sequence[Model],
) -> list[str]:
    """Notes on a plan that are not errors; `base` is None if the methods read none."""
    found = left_out_of_files((model.label, model.checkpoint.skipped) for model in inputs)
    if models.template.generic:
        found.append(
            "family: generic (no table covers this model_type): tensors are joined by identical names"
            f"{models.template.why_generic}"
        )
    if models.base is not None and base is None and models.base not in models.merged:
        found.append(f"base_model '{models.base.label}' is not read: {recipe.merge_method} needs none")
    if models.template.parted:
        found.append(
            f"'{models.template.label}': its adapter parts the head from the embedding, which its base ties. As in "
            "PEFT they are two tensors then, so the output has a head of its own, and its config.json says so "
            "(tie_word_embeddings: false)"
        )
    if models.template.ties_head and _one_is_excluded(recipe):
        found.append(
            f"exclude names one of {EMBEDDING} and {HEAD}: the template '{models.template.label}' has one tensor for "
            f"both, which goes by {EMBEDDING}"
        )
    found += [*_brought(models.template), *vocabulary_notes(models.template)]
    for model in inputs:
        found += model.remarks()
    if models.template.other and not models.template.misnamed:
        found.append(
            f"the output has the config.json of '{models.template.label}', and loads only if {models.template.other} "
            f"is a class of these tensors; if it is not, name one of family {models.template.family.name} there before "
            f"merging: {' or '.join(models.template.family.architectures) or 'none is published'}"
        )
    if models.template.fp8.scaled:
        found.append("the output is not quantized, and its config.json lacks quantization_config")
    elif quantization_method(models.template.checkpoint.config) is not None:
        found.append("the output's config.json lacks that setting: its weights are plain")
    found += has_no_effect(recipe)
    merged = dict.fromkeys(models.merged)
    own = [model for model in merged if HEAD in model.tensors and not model.ties_head]
    if models.template.ties_head and own:
        labels = " and ".join(f"'{model.label}'" for model in own)
        have = "have heads of their own" if len(own) > 1 else "has a head of its own"
        perhaps = "if it is not the embedding, " if all(model.config_ties for model in own) else ""
        found.append(
            f"{labels} {have}, which the tied template '{models.template.label}' has no place for: {perhaps}nothing of "
            f"that head is in the output. Make '{own[0].label}' the template to merge heads"
        )
    if not models.template.generic and models.template not in (*models.merged, base):
        found.append(f"template '{models.template.label}' only provides the layout: it is not among models")
    found += _beside_mergekit(recipe, models, base, settings, steps)
    return found


def has_no_effect(recipe: Recipe) -> list[str]:
    """Sentences on parameters of a recipe that count for nothing."""
    found, row = [], METHODS[recipe.merge_method]
    general = [recipe.parameters, *(entry.parameters for entry in recipe.models)]
    if any("int8_mask" in given for given in (*general, *(override.parameters for override in recipe.overrides))):
        found.append("int8_mask has no effect")
    if unused := dict.fromkeys(name for given in general for name in without_effect(row, given)):
        found.append(f"{row.name} has no parameter {listed(list(unused))}, which has no effect, as in mergekit")
    return found


def _beside_mergekit(
    recipe: Recipe, models: Models, base: Model | None, settings: Collection[Setting], steps: Sequence[Step]
) -> Iterator[str]:
    """Sentences on how a merge differs from mergekit's result for the same recipe."""
    if base is not None:
        own = [entry.parameters for place, entry in enumerate(recipe.models) if place not in models.own]
        if any("weight" in given or "density" in given for given in own):
            yield f"'{base.label}' is base_model, so its delta is zero and its own parameters have no effect"
    fused = [
        step.name for step in steps if len({piece.canonical for piece in step.pieces if piece.setting is not None}) > 1
    ]
    for setting in settings:
        row = METHODS[setting.method]
        if row.interpolates and models.base in models.merged[1:] and models.base is not models.merged[0]:
            assert models.base is not None
            yield f"t is counted from base_model '{models.base.label}'; the plan has it from '{models.merged[0].label}'"
        if drops_at_random(setting):
            yield f"{row.name} drops entries at random: reproducible for a seed, but not the ones that mergekit drops"
        if row.statistic == "importance":
            yield (
                f"{row.name} computes divergences in float64. Those of models that differ little are smaller than the "
                "rounding of float32, in which mergekit computes them, and it then takes other entries"
            )
        if fused and measures_tensors(setting):
            yield (
                f"{row.name} takes the parts of fused tensors ({fused[0]}{', ...' if fused[1:] else ''}) one by one, "
                "where mergekit takes each stored tensor as a whole"
            )


def drops_at_random(setting: Setting) -> bool:
    """Return whether a setting drops entries at random."""
    return METHODS[setting.method].random and min(setting.parameters.get("density", (0,))) < 1


def measures_tensors(setting: Setting) -> bool:
    """Return whether a setting's result for an entry depends on the rest of its tensor."""
    row, said = METHODS[setting.method], setting.parameters
    if row.statistic is None or row.span == "model" or said.get("trim") == "model":
        return False
    return bool(min(said.get("density", (0,))) < 1)


def left_out_of_files(skipped: Iterable[tuple[str, Mapping[str, str]]]) -> list[str]:
    """A sentence for each model and reason, about tensors in its files that are not part of it.

    skipped   labels of models, each with the left-out names and the reasons
    """
    found = []
    for label, names in skipped:
        for reason in dict.fromkeys(names.values()):
            those = [name for name, why in names.items() if why == reason]
            found.append(f"'{label}': {listed(those)} in its file {'are' if those[1:] else 'is'} left out: {reason}")
    return found


def _brought(model: Model) -> Iterator[str]:
    """A sentence on a base that its adapter turns into another model, with additional tensors and its own config."""
    brought, config = model.checkpoint.brought, model.checkpoint.config
    if not brought:
        return
    kind = next(iter(class_names(config)), config.get("model_type"))
    tower = config.get("mm_vision_tower")
    without = (
        f"; its vision tower, {tower}, is not in it, and whoever loads it fetches that, as LLaVA has it"
        if tower and "vision" not in model.parts
        else ""
    )
    yield (
        f"'{model.label}': the config.json beside the adapter is of another model than its base, {kind}, and the "
        f"adapter has {len(brought)} tensors of that ({brought[0]}, ...): the output is that model, in its own "
        f"layout{without}. For transformers' layout, fold onto a checkpoint in that layout"
    )
