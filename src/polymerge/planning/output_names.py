"""An output with the tensor names that its template's family is published with.

Where tensors differ in nothing but their names, the template is read under the published ones. Where a published tensor
holds what the template has in several, or in a part of one, the output has a step of its own for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from polymerge.checkpoints import Checkpoint
from polymerge.checkpoints.folder import ADAPTER, called
from polymerge.checkpoints.tensor_info import listed
from polymerge.dtypes import FP8
from polymerge.errors import RecipeError, refuse, refuse_if_any
from polymerge.families import read_names, splits
from polymerge.families.derived import SAVE_AGAIN
from polymerge.families.expressions import Shape, names_read
from polymerge.families.names_on_disk import Published, why_published
from polymerge.families.recognition import Reading
from polymerge.families.resolve import map_names
from polymerge.planning.model import Form, Model

__all__ = ["names_told", "read_as_published", "with_published_forms"]


def read_as_published(
    label: str, checkpoint: Checkpoint, names: Published, shapes: Mapping[str, Shape], told: str | None
) -> tuple[Checkpoint, Reading, dict[str, str]]:
    """A checkpoint under published names, as far as its tensors are stored so; how they are read; and what was renamed.

    told   the family that the user names, if any

    raises RecipeError for weights in fp8, whose scales have names of their own.
    """
    if any(entry.dtype in FP8 for entry in checkpoint.entries.values()):
        raise RecipeError(
            f"names: published: '{label}' has weights in fp8, whose scales go by their names. Merge it without "
            "`names` first, which writes plain numbers, and then that"
        )
    reading = read_names(checkpoint.config, names.shapes, told)
    order = reading.family.order
    renamed = {
        own: held[0]
        for own, held in names.names.items()
        if len(held) == 1 and held[0] != own and names.shapes[held[0]] == shapes[own] and order(held[0]) == order(own)
    }
    return called(checkpoint, renamed), reading, renamed


def with_published_forms(model: Model) -> Model:
    """The template of an output that has published tensors where the template, read under such names, has others.

    raises Refused, by name, where the plan's expressions cannot say what such a tensor is made of.
    """
    names = model.named
    forms = {
        own: {new: names.shapes[new] for new in held} for own, held in names.names.items() if own not in model.renamed
    }
    if not forms:
        return model
    config, shapes = model.checkpoint.config, {new: shape for held in forms.values() for new, shape in held.items()}
    mapped = map_names(model.family, shapes, f"'{model.label}'", splits(config, model.family), shapes)
    before = {canonical for own in forms for canonical, _ in model.layout.get(own, ())}
    refuse_if_any(_not_the_same(model, forms, before, {name for held in mapped.layout.values() for name, _ in held}))
    refuse_if_any(mapped.problems)
    made: dict[str, dict[str, Form]] = {}
    for own, held in forms.items():
        made[own] = {}
        for new, shape in held.items():
            read = {name for canonical, _ in mapped.layout[new] for name in names_read(model.tensors[canonical])}
            dtypes = {model.entries[name].dtype for name in read if not name.startswith(ADAPTER)}
            refuse_if_any(_mixed(model, new, dtypes))
            made[own][new] = Form(dtypes.pop(), shape)
    kept = {own: held for own, held in model.layout.items() if own not in forms}
    return replace(
        model, layout={**kept, **mapped.layout}, views={**model.views, **mapped.views}, forms=made,
        moved=frozenset(before),
    )  # fmt: skip


def names_told(model: Model, asked: bool) -> Iterator[str]:
    """Sentences on the names of an output with this template; `asked` if the recipe wants the published ones.

    refuses what the recipe wants and nobody knows.
    """
    names = model.named
    if not asked:
        if said := why_published(f"'{model.label}'", names):
            yield said
        return
    if names.why:
        refuse(RecipeError(f"names: published: what '{model.label}' is published with is not known: {names.why}"))
        return
    if not names.names:
        yield f"names: published changes nothing: '{model.label}' has the names that its family is published with"
        return
    changed = ((own, held[0]) for own, held in names.names.items() if held and held[0] != own)
    example = next((f", such as '{new}' for '{own}'" for own, new in changed), "")
    apart = sum(len(held) for held in model.forms.values())
    more = f"; {apart} are cut, joined or turned as there" if apart else ""
    yield (
        f"names: published: {len(names.names)} tensors of '{model.label}' are written as its family is "
        f"published{example}{more}"
    )


def _not_the_same(
    model: Model, forms: Mapping[str, Mapping[str, Shape]], before: set[str], after: set[str]
) -> Iterator[RecipeError]:
    """An error if published tensors hold something else than those that they are made of."""
    if before != after:
        few = [new for held in forms.values() for new in held] or list(forms)
        yield RecipeError(
            f"names: published: '{model.label}': {listed(few)} would be made of {listed(list(forms))}, and the plan "
            f"has no expression for that. {SAVE_AGAIN}"
        )


def _mixed(model: Model, new: str, dtypes: set[str]) -> Iterator[RecipeError]:
    if len(dtypes) > 1:
        yield RecipeError(
            f"names: published: '{model.label}': '{new}' would be made of tensors of {' and '.join(sorted(dtypes))}. "
            "Store them in one dtype first"
        )
