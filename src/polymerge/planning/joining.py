"""Apply the changes of an adapter to its base's tensors, and note those that have no place or do not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property

from polymerge.checkpoints.adapter import Adapter
from polymerge.checkpoints.folder import ADAPTER
from polymerge.checkpoints.pairs import Pair
from polymerge.errors import CheckpointError, PolymergeError, RecipeError, refuse
from polymerge.families.expressions import Adapted, Concat, Expr, Read, Rows, Shape, replace_reads, shape_of
from polymerge.planning.adapter_places import Block, Parameters, Place, Reading, name_the_base, other_projector
from polymerge.planning.fit import layer_pattern
from polymerge.planning.model import VOCABULARY

__all__ = ["Joining"]


class Joining:
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

    def transposed(self, pair: Pair, place: Place) -> bool:
        """Whether the update of a module is added transposed to the weight at a place.

        PEFT goes by the class of each module, and its config says what is true of the last one only: of GPT-2's layers,
        which store [in, out], or of its head. Where the base has layers of both kinds, a square weight is like those
        nearest to it that are not.
        """
        have = self.shape(place)
        ways = {flip for flip, shape in ((False, pair.shape), (True, pair.shape[::-1])) if shape == have}
        if pair.embedding or not ways or True not in self._lying.values():
            return pair.transposed
        if len(ways) == 1:
            return ways.pop()
        around = place[0][0].rpartition(".")[0]
        while "." in around:
            around = around.rpartition(".")[0]
            near = {flip for name, flip in self._lying.items() if name.startswith(f"{around}.")}
            if len(near) == 1:
                return near.pop()
        return pair.transposed

    @cached_property
    def _lying(self) -> dict[str, bool]:
        """By the name of each weight in the base whose bias tells, whether it lies as [in, out]."""
        shapes = self.base.shapes
        biased = {name: (shape, shapes.get(f"{name.removesuffix('weight')}bias")) for name, shape in shapes.items()}
        return {
            name: bias == shape[1:]
            for name, (shape, bias) in biased.items()
            if name.endswith(".weight") and len(shape) == 2 and shape[0] != shape[1] and bias in (shape[:1], shape[1:])
        }

    def add_experts(self, pair: Pair) -> None:
        """Add the updates of a parameter's experts, which may lie in one tensor or apart."""
        places = self.parameters.places_of_experts(pair.module, pair.experts, self.reading)
        if places is None:
            self.missing[pair.module] = None
            return
        flip = self._flipped(pair, places[0])
        if flip is None or any(self.own(name) is None for place in places for name, _ in place):
            return
        a, b = ADAPTER + pair.a.name, ADAPTER + pair.b.name

        def adapted(of: Expr, expert: int) -> Expr:
            return Adapted(of, a, b, pair.scaling, flip, (expert, pair.experts))

        if len(places) == pair.experts:
            for expert, place in enumerate(places):
                self.put(place, adapted(self.now(place), expert))
            return
        (whole,) = places  # of a family that is not known
        now = self.now(whole)
        self.put(whole, Concat(tuple(adapted(Rows(now, one, one + 1), one) for one in range(pair.experts))))

    def _flipped(self, pair: Pair, place: Place) -> bool | None:
        """Whether the updates of experts are added transposed to the matrices at a place; None, refused, if unclear."""
        have = self.shape(place)
        if len(have) == 3 and have[0] != pair.experts:
            self._unfit(pair.module, place, (pair.experts, *pair.shape), have)
            return None
        ways = {flip for flip, shape in ((False, pair.shape), (True, pair.shape[::-1])) if shape == have[-2:]}
        if len(ways) > 1:  # a square matrix: as the others of this adapter
            others = [one for one in self.adapter.pairs.values() if one.experts and one.shape[0] != one.shape[1]]
            found = [(one, self.parameters.places_of_experts(one.module, one.experts, self.reading)) for one in others]
            shapes = [(one.shape, self.shape(places[0])[-2:]) for one, places in found if places]
            ways = {shape != there for shape, there in shapes} or ({False} if not pair.as_stored else ways)
        if len(ways) == 1:
            return ways.pop()
        if ways:
            refuse(
                RecipeError(
                    f"'{self.base.label}': {pair.module} of the adapter is square, and PEFT before 0.19 did not say "
                    "which of its factors is the output's. Fold it with that PEFT's merge_and_unload()"
                )
            )
        else:
            self._unfit(pair.module, place, pair.shape, have)
        return None

    def fits(self, place: Place, shape: Shape, what: str, resizing: bool = False) -> bool:
        """Return whether a change of this shape fits; with `resizing`, the number of vocabulary rows may differ."""
        have = self.shape(place)
        if have == shape or (resizing and self._of_tokens(place) and have[1:] == shape[1:]):
            return True
        self._unfit(what, place, shape, have)
        return False

    def _unfit(self, what: str, place: Place, shape: Shape, have: Shape) -> None:
        """Note a change that does not fit."""
        kind = ("projector", (), ()) if self._of_projector(place) else (layer_pattern(what), shape, have)
        self._wrong.setdefault(kind, []).append((what, place, shape, have))

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

    def experts(self) -> dict[str, Expr]:
        """The new expression of each changed canonical tensor that lies with all experts in one tensor on disk."""
        return {
            canonical: self._state[own, ranges]
            for own in {name for name, ranges in self._state if ranges} & self.base.views.keys()
            if (own, ()) not in self._state
            for canonical, ranges in self.parameters.layout[own]
            if (own, ranges) in self._state
        }

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
                lying = self.base.views.get(own, Read(own))
                pieces = [
                    Rows(self._state[block], first, first + stop - start)
                    if block in self._state
                    else Rows(lying, start, stop)
                    for start, stop, block, first in sorted(rows)
                ]
                whole = replace_reads(Concat(tuple(pieces)), _instead(own, whole))
            found[own] = whole
        return found


def _begins(block: Block) -> list[int]:
    """The start of each range of a block when its ranges are stacked."""
    heights = [stop - start for start, stop in block[1]]
    return [sum(heights[:place]) for place in range(len(heights))]


def _instead(own: str, whole: Expr) -> Callable[[str], Expr]:
    return lambda name: whole if name == own else Read(name)
