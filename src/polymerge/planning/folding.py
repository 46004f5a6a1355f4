"""Fold an adapter into its base: the result is one model whose tensors are read with the adapter's changes applied.

Folding alone is a merge of that single model with the method `copy`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from polymerge.checkpoints.adapter import Adapter, open_adapter
from polymerge.checkpoints.files import class_names
from polymerge.checkpoints.folder import ADAPTER
from polymerge.checkpoints.hub import locate
from polymerge.errors import RecipeError, refuse
from polymerge.families.expressions import Adapted, Concat, Expr, Read, Rows, replace_reads
from polymerge.planning.adapter_places import (
    Parameters,
    Place,
    base_named,
    named_family,
    no_place_for_a_head,
    unequal_rows,
    unknown_head,
    why_missing,
)
from polymerge.planning.joining import Joining
from polymerge.planning.model import Model, Ties
from polymerge.recipe.recipe import Names

__all__ = ["fold_recipe", "folded"]

_TASK_HEADS: Final = ("score", "classifier", "qa_outputs", "v_head", "value_head", "reward_head", "regression_head")
"""Names of heads in classes for tasks other than language modelling."""

_BENEATH: Final = ".base_layer.weight"
"""Suffix of the original weights that PEFT stores for an adapted embedding or head; biases there are trained."""


def fold_recipe(
    adapter: str, base: str | None, ignore: Sequence[str] = (), names: Names = "template"
) -> dict[str, Any]:
    """The recipe that folds `adapter` into `base`, by default the model that the adapter's config names.

    ignore  globs on names of tensors as stored, in either of them, that are left out
    names   published, for those that the base's family is published with

    raises RecipeError where `adapter` is no adapter, or names no base, and what `open_adapter` raises.
    """
    named = base or base_named(open_adapter(adapter, locate(adapter)).config)
    if not named:
        raise RecipeError(f"{adapter}: its config names no base: pass the model that it was trained on as `base`")
    recipe: dict[str, Any] = {"merge_method": "copy", "models": [f"{named}+{adapter}"]}
    return recipe | ({"ignore": list(ignore)} if ignore else {}) | ({"names": names} if names != "template" else {})


def folded(base: Model, adapter: Adapter) -> Model:
    """Combine a base and its adapter into one model.

    Where a base stores one tensor as head and embedding, and the adapter parts the two as PEFT loads it, the one that
    is not stored is read under the name that it has in the base's layout.

    refuses parameters of the adapter that the base lacks, or has in another shape or in a dtype that cannot be
    added to; only the rows of the vocabulary may become more or fewer, where the adapter has all of them.
    """
    found, direct, left_out = _changes(Parameters(base), adapter)
    apart = _parted(base.ties, found, adapter)
    tensors = {
        canonical: direct.get(canonical) or replace_reads(expr, lambda own: found.get(own, Read(own)))
        for canonical, expr in base.tensors.items()
    }
    layout, borrowed = base.layout, base.borrowed
    if base.ties is not None and base.ties.virtual:
        (virtual,) = base.borrowed
        tensors[virtual] = found.get(base.ties.virtual, tensors[virtual])
        if apart:
            layout, borrowed = {**layout, base.ties.virtual: ((virtual, ()),)}, frozenset()
    checkpoint = replace(base.checkpoint, skipped={**base.checkpoint.skipped, **left_out})
    return replace(
        base, checkpoint=checkpoint, tensors=tensors, layout=layout, borrowed=borrowed, adapted=found, parted=apart
    )


def _changes(parameters: Parameters, adapter: Adapter) -> tuple[dict[str, Expr], dict[str, Expr], dict[str, str]]:
    """The changes that an adapter makes to its base.

    returns   the expression for each changed tensor of the base, by its own name, and for those of experts, which are
              many in one tensor, by canonical name; and the names of unused tensors of the adapter with the reasons
    """
    reading = parameters.reading(adapter)
    joining = Joining(parameters, adapter, reading)
    ties = parameters.base.ties
    left_out: dict[str, str] = {}
    apart = joining.apart()
    elsewhere = {reading.family.name, *(own.name for own in named_family(adapter))} != {parameters.base.family.name}
    # the base's own tensor lies there before all that PEFT trains beside it
    for parameter, entry in sorted(adapter.non_lora.items(), key=lambda held: held[0] in apart):
        if parameters.place(parameter, reading) is None and parameter.split(".")[0] in _TASK_HEADS:
            kind = next(iter(class_names(parameters.base.checkpoint.config)), "a model without one")
            left_out[ADAPTER + entry.name] = (
                f"is a head for another task than its base ({kind}) has, so the output is without it. To keep it, fold "
                "onto a model of the class that the adapter was trained as"
            )
            continue
        place = joining.own(parameter)
        if elsewhere and place is not None and entry.name.endswith(_BENEATH) and joining.shape(place) == entry.shape:
            left_out[ADAPTER + entry.name] = (
                "is what lay beneath its factors in the model that it was trained on, and this base has its own"
            )
        elif place is not None and joining.fits(place, entry.shape, parameter, resizing=True):
            for one in (place,) if parameter in apart else joining.tied_with(place):
                joining.put(one, Read(ADAPTER + entry.name))
    trained: dict[Place, tuple[tuple[int, ...], str]] = {}
    for parameter, (indices, entry) in adapter.tokens.items():
        place = joining.own(parameter)
        if adapter.tokens_of_tied and ties and place == ((ties.head, ()),):
            continue  # the same rows as those of the embedding, which PEFT wrote twice
        if place is not None:
            rows = joining.shape(place)[0]
            grown = set(range(rows, max(indices) + 1)) <= set(indices)
            total = max(rows, max(indices) + 1)
            if joining.fits(place, (total, *entry.shape[1:]), parameter, resizing=grown):
                joining.put(place, _with_rows(joining.now(place), rows, indices, ADAPTER + entry.name))
                trained[place] = indices, ADAPTER + entry.name
    if ties and (embedding := ((ties.embedding, ()),)) in trained and (head := ((ties.head, ()),)) not in trained:
        # PEFT has these rows in the head as well, before it adds anything else to it
        joining.put(head, _with_rows(joining.now(head), joining.shape(head)[0], *trained[embedding]))
    for pair in adapter.pairs.values():
        if pair.experts:
            joining.add_experts(pair)
            continue
        place = joining.own(pair.parameter)
        if place is not None:
            pair = replace(pair, transposed=joining.transposed(pair, place))
            if joining.fits(place, pair.stored, pair.module):
                a, b = ADAPTER + pair.a.name, ADAPTER + pair.b.name
                joining.put(place, Adapted(joining.now(place), a, b, pair.scaling, pair.transposed))
        if pair.bias is not None:
            joining.add_bias(pair)
    missing = joining.missing
    found = joining.found()
    if ties and ties.virtual:
        _part(ties, found, joining.kept_tied)
    refuse(
        *no_place_for_a_head(parameters, missing),
        *why_missing(parameters, adapter, reading, missing),
        *joining.misshapen(),
        *unequal_rows(parameters, found),
        *unknown_head(parameters, adapter),
    )
    return found, joining.experts(), left_out


def _part(ties: Ties, found: dict[str, Expr], kept_tied: bool) -> None:
    """Decide the fate of the half of a tied pair that the base does not store.

    It stays tied if the adapter says so or changes both alike.
    """
    before = Read(ties.stored)
    other = found.pop(ties.virtual, before)
    if not kept_tied and found.get(ties.stored, before) != other:
        found[ties.virtual] = other


def _parted(ties: Ties | None, found: Mapping[str, Expr], adapter: Adapter) -> bool:
    """Return whether an adapter unties a head and an embedding that its base's config ties."""
    if ties is None or ties.virtual:
        return ties is not None and ties.virtual in found
    one = found.get(ties.embedding, Read(ties.embedding))
    other = replace_reads(
        found.get(ties.head, Read(ties.head)), lambda own: Read(ties.embedding if own == ties.head else own)
    )
    return one != other and adapter.config.get("ensure_weight_tying") is not True


def _with_rows(expr: Expr, total: int, indices: tuple[int, ...], rows: str) -> Expr:
    """An embedding whose rows at `indices` are replaced by the rows of tensor `rows`, in that order."""
    blocks: list[Expr] = []
    end = 0
    for index, place in sorted((index, place) for place, index in enumerate(indices)):
        if end < index:
            blocks.append(Rows(expr, end, index))
        blocks.append(Rows(Read(rows), place, place + 1))
        end = index + 1
    if end < total:
        blocks.append(Rows(expr, end, total))
    return Concat(tuple(blocks))
