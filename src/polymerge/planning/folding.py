"""Fold an adapter into its base: the result is one model whose tensors are read with the adapter's changes applied.

Folding alone is a merge of that single model with the method `copy`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from polymerge.checkpoints.adapter import Adapter, Pair, open_adapter
from polymerge.checkpoints.files import class_names
from polymerge.checkpoints.folder import ADAPTER
from polymerge.checkpoints.hub import locate
from polymerge.errors import CheckpointError, PolymergeError, RecipeError, refuse
from polymerge.families.expressions import Adapted, Concat, Expr, Read, Rows, Shape, replace_reads, shape_of
from polymerge.planning.adapter_places import (
    Block,
    Parameters,
    Place,
    Reading,
    base_named,
    name_the_base,
    named_family,
    no_place_for_a_head,
    other_projector,
    unequal_rows,
    unknown_head,
    why_missing,
)
from polymerge.planning.fit import layer_pattern
from polymerge.planning.model import VOCABULARY, Model, Ties

__all__ = ["fold_recipe", "folded"]

_TASK_HEADS: Final = ("score", "classifier", "qa_outputs", "v_head", "value_head", "reward_head", "regression_head")
"""Names of heads in classes for tasks other than language modelling."""

_BENEATH: Final = ".base_layer.weight"
"""Suffix of the original weights that PEFT stores for an adapted embedding or head; biases there are trained."""


def fold_recipe(adapter: str, base: str | None, ignore: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe that folds `adapter` into `base`, by default the model that the adapter's config names.

    ignore  globs on names of tensors as stored, in either of them, that are left out

    raises RecipeError where `adapter` is no adapter, or names no base, and what `open_adapter` raises.
    """
    named = base or base_named(open_adapter(adapter, locate(adapter)).config)
    if not named:
        raise RecipeError(f"{adapter}: its config names no base: pass the model that it was trained on as `base`")
    recipe: dict[str, Any] = {"merge_method": "copy", "models": [f"{named}+{adapter}"]}
    return recipe | ({"ignore": list(ignore)} if ignore else {})


def folded(base: Model, adapter: Adapter) -> Model:
    """Combine a base and its adapter into one model.

    Where a base stores one tensor as head and embedding, and the adapter parts the two as PEFT loads it, the one that
    is not stored is read under the name that it has in the base's layout.

    refuses parameters of the adapter that the base lacks, or has in another shape or in a dtype that cannot be
    added to; only the rows of the vocabulary may become more or fewer, where the adapter has all of them.
    """
    found, left_out = _changes(Parameters(base), adapter)
    apart = _parted(base.ties, found, adapter)
    tensors = {
        canonical: replace_reads(expr, lambda own: found.get(own, Read(own)))
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


def _changes(parameters: Parameters, adapter: Adapter) -> tuple[dict[str, Expr], dict[str, str]]:
    """The changes that an adapter makes to its base.

    returns   the expression for each changed tensor of the base, by its own name; and the names of unused tensors of
              the adapter, each with the reason
    """
    reading = parameters.reading(adapter)
    joining = _Joining(parameters, adapter, reading)
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
        place = joining.own(f"{pair.module}.weight")
        if place is not None and joining.fits(place, pair.shape[::-1] if pair.transposed else pair.shape, pair.module):
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
    return found, left_out


class _Joining:
    """Applies an adapter's changes to the base's tensors, and notes those that have no place or do not fit."""

    def __init__(self, parameters: Parameters, adapter: Adapter, reading: Reading) -> None:
        self.parameters, self.adapter, self.reading = parameters, adapter, reading
        self.base, self.ties = parameters.base, parameters.base.ties
        self.missing: dict[str, None] = {}
        self.kept_tied = bool(self.ties and self.ties.virtual) and adapter.config.get("ensure_weight_tying") is True
        self._state: dict[Block, Expr] = {}
        self._wrong: dict[tuple[str, Shape, Shape], list[tuple[str, Place, Shape, Shape]]] = {}

    def own(self, parameter: str) -> Place | None:
        """Locate a parameter in the base; missing parameters are noted, unsuitable dtypes refused."""
        place = self.parameters.place(parameter, self.reading)
        if self.kept_tied and self.ties and place == ((self.ties.virtual, ()),):
            return None  # the same numbers as those of the other one, which PEFT wrote twice
        for name, _ in place or ():
            entry = self.parameters.entry(name)
            if not self.base.has_numbers(entry.name):
                refuse(
                    CheckpointError(
                        f"'{self.base.label}': {name} is held as {entry.dtype}: an adapter cannot be added to it"
                    )
                )
                return None
        if place is None:
            self.missing[parameter] = None
        return place

    def tied_with(self, place: Place | None) -> tuple[Place, ...]:
        """All places that share one tensor with this one in the base, itself included."""
        ties = self.ties
        both = (((ties.embedding, ()),), ((ties.head, ()),)) if ties and ties.virtual else ()
        return both if place in both else (place,) if place else ()

    def apart(self) -> set[str]:
        """The full weights of only one half of a tied pair: PEFT's copies, and two in files beside PEFT's."""
        adapter, place = self.adapter, self.parameters.place
        beside = [name for name, entry in adapter.non_lora.items() if entry.file in adapter.beside]
        tied = {name for name in beside if len(self.tied_with(place(name, self.reading))) == 2}
        return {name for name in adapter.non_lora if adapter.saved_apart(name)} | (tied if len(tied) == 2 else set())

    def now(self, place: Place) -> Expr:
        """The expression at a place, with the changes so far."""
        blocks = tuple(self._state.get(block, self.parameters.read(block)) for block in place)
        return blocks[0] if len(blocks) == 1 else Concat(blocks)

    def shape(self, place: Place) -> Shape:
        """The shape of the tensor at a place."""
        return shape_of(self.now(place), self.base.shapes)

    def put(self, place: Place, expr: Expr) -> None:
        """Replace the expression at a place."""
        first = 0
        for block in place:
            height = shape_of(self.parameters.read(block), self.base.shapes)[0]
            self._state[block] = expr if len(place) == 1 else Rows(expr, first, first + height)
            first += height

    def add_bias(self, pair: Pair) -> None:
        """Add the bias of a pair's second factor."""
        place = self.own(f"{pair.module}.bias")
        if place is not None and pair.bias is not None:
            self.put(place, Adapted(self.now(place), None, ADAPTER + pair.bias.name, pair.scaling))

    def fits(self, place: Place, shape: Shape, what: str, resizing: bool = False) -> bool:
        """Return whether a change of this shape fits; with `resizing`, the number of vocabulary rows may differ."""
        have = self.shape(place)
        if have == shape or (resizing and self._of_tokens(place) and have[1:] == shape[1:]):
            return True
        kind = ("projector", (), ()) if self._of_projector(place) else (layer_pattern(what), shape, have)
        self._wrong.setdefault(kind, []).append((what, place, shape, have))
        return False

    def _of_tokens(self, place: Place) -> bool:
        """Return whether the rows of a place are the vocabulary."""
        ((name, _), *more) = place
        return not more and any(canonical in VOCABULARY for canonical, _ in self.parameters.layout[name])

    def _of_projector(self, place: Place) -> bool:
        """Return whether a place is in the projector."""
        return any(
            canonical.startswith("projector.") for name, _ in place for canonical, _ in self.parameters.layout[name]
        )

    def misshapen(self) -> Iterable[PolymergeError]:
        """An error for each kind of change that does not fit; similar layers share one."""
        for found in self._wrong.values():
            what, place, shape, have = found[0]
            names = " with ".join(dict.fromkeys(name for name, _ in place))
            more = f" ({len(found) - 1} more like it)" if len(found) > 1 else ""
            if self._of_tokens(place) and have[1:] == shape[1:]:
                way = (
                    "The vocabulary was resized in training, and the adapter does not have all of its new rows. Save "
                    f"it with the full embedding (save_embedding_layers=True), or name the base with "
                    f"{shape[0]} rows, as it was trained"
                )
            elif self._of_projector(place):
                way = f"The projectors differ in kind. {other_projector(self.adapter)}"
            else:
                way = name_the_base(self.base.checkpoint, self.adapter)
            yield RecipeError(
                f"'{self.base.label}': {what} of the adapter is for {list(shape)}{more}, {names} of its base is "
                f"{list(have)}. {way}"
            )

    def found(self) -> dict[str, Expr]:
        """The new expression of each changed tensor on disk."""
        found: dict[str, Expr] = {}
        for own in dict.fromkeys(name for name, _ in self._state):
            whole = self._state.get((own, ()), Read(own))
            rows = [
                (start, stop, block, first)
                for block in ((own, ranges) for _, ranges in self.parameters.layout[own])
                for (start, stop), first in zip(block[1], _begins(block), strict=True)
            ]
            if any(block in self._state for _, _, block, _ in rows):
                pieces = [
                    Rows(self._state[block], first, first + stop - start)
                    if block in self._state
                    else Rows(Read(own), start, stop)
                    for start, stop, block, first in sorted(rows)
                ]
                whole = replace_reads(Concat(tuple(pieces)), _instead(own, whole))
            found[own] = whole
        return found


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


def _begins(block: Block) -> list[int]:
    """The start of each range of a block when its ranges are stacked."""
    heights = [stop - start for start, stop in block[1]]
    return [sum(heights[:place]) for place in range(len(heights))]


def _instead(own: str, whole: Expr) -> Callable[[str], Expr]:
    return lambda name: whole if name == own else Read(name)


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
