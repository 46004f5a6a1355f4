"""What a plan leaves of its inputs, each tensor with the reason, and what else a person should know of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from polymerge.families import quantization_method
from polymerge.planning.data import LeftOut, Piece, Step
from polymerge.planning.inputs import Models
from polymerge.planning.model import HEAD, Model, part_of
from polymerge.reads import Expr, names_read
from polymerge.recipe import Recipe

__all__ = ["Leavings", "notes", "partly_kept"]


@dataclass
class Leavings:
    """Why tensors of the inputs are not read: noted while a plan is made, and told when its steps are known.

    parts    that are merged; None where names have no parts
    kept     canonical names whose place in the output the template's own tensor has, each with why
    extras   what a model (its label) has and the template has not, by canonical name, each with why it may be lost
    """

    template: Model
    parts: frozenset[str] | None
    kept: dict[str, str] = field(default_factory=dict)
    extras: dict[tuple[str, str], str] = field(default_factory=dict)

    def left_out(
        self, inputs: Sequence[Model], models: Sequence[Model], base: Model | None, steps: Sequence[Step]
    ) -> tuple[LeftOut, ...]:
        """Every tensor of an input that no step reads, each with its reason."""
        places = [inputs.index(model) for model in models]
        own_base = None if base is None else inputs.index(base)
        used = {(inputs.index(self.template), step.name) for step in steps}
        for step in steps:
            for piece in step.pieces:
                used.update((place, own) for place, expr in _reads(piece, places, own_base) for own in names_read(expr))
        left_out: list[LeftOut] = []
        for place, model in enumerate(inputs):
            kept = {model.find(canonical): why for canonical, why in reversed(self.kept.items())}
            left_out += [
                LeftOut(place, own, self._why(model, own, kept)) for own in model.entries if (place, own) not in used
            ]
        return tuple(left_out)

    def _why(self, model: Model, own: str, kept: Mapping[str | None, str]) -> str:
        """Why no step reads a tensor; `kept` by the names that the model has for it."""
        if own in model.ignored:
            return "ignored by the recipe"
        if own in model.adapted and own not in names_read(model.adapted[own]):
            return "its adapter has another in its place"
        if own in model.buffers:
            return "a buffer that is computed from the config, never merged"
        reasons = []
        for name in model.held(own):
            if (model.label, name) in self.extras:
                reasons.append(self.extras[model.label, name])
            elif name in kept:
                reasons.append(f"the template's is kept: {kept[name]}")
            elif name == HEAD and self.template.ties_head:
                reasons.append("the template ties its head to its embedding")
            elif self.parts is not None and part_of(name) not in self.parts:
                reasons.append(f"part {part_of(name)} is not merged")
        return "; ".join(dict.fromkeys(reasons)) or "the method does not read it"


def _reads(piece: Piece, models: Sequence[int], base: int | None) -> Iterator[tuple[int, Expr]]:
    """Each input that a piece reads, and what of it."""
    yield from zip(piece.inputs or models, piece.reads, strict=True) if piece.reads else ()
    if base is not None and piece.base is not None:
        yield base, piece.base


def partly_kept(kept: Mapping[str, str], dtype: str) -> str:
    """What a merged tensor says of the parts that stay the template's.

    kept   their canonical names, each with why
    dtype  in which they are written, if it is another one than the template's
    """
    reasons = []
    for reason in dict.fromkeys(kept.values()):
        first, *more = (name for name, why in kept.items() if why == reason)
        reasons.append(f"{first}{f' and {len(more)} more are' if more else ' is'} the template's: {reason}")
    return "; ".join(reasons) + (f" (as {dtype}, like the rest)" if reasons and dtype else "")


def notes(recipe: Recipe, models: Models, base: Model | None) -> list[str]:
    """What a person should know of a plan although nothing forbids it; `base` is read, that of the models is named."""
    found = []
    if models.template.generic:
        found.append("family: generic (no table covers this model_type): tensors are joined by identical names")
    if models.base is not None and base is None:
        found.append(f"base_model '{models.base.label}' is not read: {recipe.merge_method} needs none")
    if models.template.changes_tied_head:
        found.append(
            f"'{models.template.label}': its adapter changes the embedding, and its base ties the head to that, so "
            "the head changes too. Where the head stayed as it was in training, as PEFT has it unless "
            "ensure_weight_tying is set, this is another model"
        )
    for model in dict.fromkeys((models.template, *models.merged, *([base] if base else []))):
        found += model.remarks()
    if models.template.other:
        found.append(
            f"the output has the config.json of '{models.template.label}', and loads only if {models.template.other} "
            f"is a class of these tensors; if it is not, name one of family {models.template.family.name} there before "
            f"merging: {' or '.join(models.template.family.architectures) or 'none is published'}"
        )
    if quantization_method(models.template.checkpoint.config) is not None:
        found.append("the output's config.json is without that entry: its weights are plain")
    said = [recipe.parameters, *(entry.parameters for entry in recipe.models)]
    said += [override.parameters for override in recipe.overrides]
    if any("int8_mask" in parameters for parameters in said):
        found.append("int8_mask has no effect")
    for model in models.merged:
        if models.template.ties_head and HEAD in model.tensors and not model.ties_head:
            found.append(f"'{model.label}' has a head of its own, which the tied template '{models.template.label}' "
                         "has no place for")  # fmt: skip
    if not models.template.generic and models.template not in models.merged:
        found.append(f"template '{models.template.label}' gives the layout only: it is not among models")
    return found
