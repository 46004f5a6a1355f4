"""Statistics over whole models: one threshold for all that a method trims, or the models' dot products.

They are computed before the first tensor is merged, and may be of parts that are looked through on other machines: what
these find adds up exactly, so that the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

from polymerge.engine.blocks import PieceBlocks
from polymerge.engine.cutoffs import Found, RunAll, Window
from polymerge.engine.statistics import Deltas, added_up, cutoffs, gram
from polymerge.planning import Piece, Plan, Step
from polymerge.recipe.parameters import Setting

__all__ = ["Elsewhere", "Merged", "WholeModels", "Wholes", "measured_with"]

Merged: TypeAlias = tuple[Step, Piece]
"""A merged piece, and the step that it is of."""


class Wholes(NamedTuple):
    """What is known of whole models, by the index of the setting that needs it: cutoffs, and dot products."""

    cutoffs: Mapping[int, list[float]]
    grams: Mapping[int, Any]


class Elsewhere(Protocol):
    """Looks through pieces on other machines."""

    def look(self, merged: Sequence[Merged], windows: Sequence[Window]) -> Sequence[Found]:
        """One pass over pieces, as for `exact_cutoffs`."""

    def dots(self, merged: Sequence[Merged]) -> Sequence[Any]:
        """Terms of the dot products over pieces, as of `dot_products`."""


@dataclass(frozen=True)
class WholeModels:
    """Computes the statistics over whole models that a plan needs.

    blocks   of a piece, in full cells or not
    repeats  whether a piece has the numbers of another
    once     the value for a key, computed if it is not known
    key      of everything that the numbers of a piece depend on
    run_all  maps over blocks
    """

    plan: Plan
    blocks: Callable[[Step, Piece, bool], PieceBlocks]
    repeats: Callable[[Piece, Piece], bool]
    once: Callable[[Hashable, Callable[[], Any]], Any]
    key: Callable[[Step, Piece], Hashable]
    run_all: RunAll

    def found(self, elsewhere: Elsewhere | None = None) -> Wholes:
        """All of them.

        elsewhere  what looks through the pieces; by default they are read here
        """
        cut: dict[int, list[float]] = {}
        grams: dict[int, Any] = {}
        for number, setting in enumerate(self.plan.settings):
            if setting.parameters.get("trim") == "model":
                cut[number] = self._cutoffs(number, setting, elsewhere)
            elif setting.row.span == "model":
                grams[number] = self._gram(number, elsewhere)
        return Wholes(cut, grams)

    def named(self, names: Container[str], *, in_cells: bool) -> list[PieceBlocks]:
        """The blocks of merged pieces, by canonical name."""
        found = {piece.canonical: (step, piece) for step, piece, _ in self.plan.merged_pieces()}
        return [self.blocks(*one, in_cells) for name, one in found.items() if name in names]

    def _cutoffs(self, number: int, setting: Setting, elsewhere: Elsewhere | None) -> list[float]:
        """One cutoff per model over everything that a setting, and others of its schedule, merge."""
        merged = self._merged_by(number)

        def cut() -> list[float]:
            blocks = [self.blocks(*one, False) for one in merged]
            held = [one for one, of in zip(merged, blocks, strict=True) if of.count]
            look = None if elsewhere is None else partial(elsewhere.look, held)
            return cutoffs(Deltas(blocks), setting.parameters, self.run_all, look)

        key = ("cutoffs", setting.parameters["density"], *(self.key(*one) for one in merged))
        found: list[float] = self.once(key, cut)
        return found

    def _gram(self, number: int, elsewhere: Elsewhere | None) -> Any:
        """The models' dot products over everything that a setting, and others of its schedule, merge."""
        merged = self._merged_by(number)

        def measure() -> Any:
            blocks = [self.blocks(*one, True) for one in merged]
            if not any(of.count for of in blocks):
                return None  # which nobody asks for then
            if elsewhere is None:
                return gram([of for of in blocks if of.count], self.run_all)
            return added_up(elsewhere.dots([one for one, of in zip(merged, blocks, strict=True) if of.count]))

        return self.once(("gram", *(self.key(*one) for one in merged)), measure)

    def _merged_by(self, number: int) -> list[Merged]:
        """The pieces that a setting and others of its schedule merge; duplicates count once."""
        alike = measured_with(self.plan, number)
        found = {
            piece.canonical: (step, piece) for step, piece, _ in self.plan.merged_pieces() if piece.setting in alike
        }
        return [
            (step, piece)
            for step, piece in found.values()
            if piece.twin not in found or not self.repeats(piece, found[piece.twin][1])
        ]


def measured_with(plan: Plan, number: int) -> frozenset[int]:
    """The settings that have a statistic over the whole model in common with one: those of its schedule, and that of
    what is not calibrated beside it.
    """
    settings = plan.settings
    own = [{name: value for name, value in one.parameters.items() if one.row.parameter(name)} for one in settings]
    known = [one.schedule or (one.method, said) for one, said in zip(settings, own, strict=True)]
    return frozenset(place for place, one in enumerate(known) if one == known[number])
