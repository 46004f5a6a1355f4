"""What the numbers of a kind of merge say: what to try first, how much to expect, and what did not help."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from intervals import Estimate, estimate

__all__ = ["Advice", "advise"]

NAMED = 6  # in a sentence


@dataclass(frozen=True)
class Advice:
    """What follows for a kind of merge, all in points of the mean share of right answers.

    reference    what is simplest
    gains        of every merge over the model without one
    differences  of every other merge to the reference, within a seed
    controls     those of them that nobody would merge by
    over         of each control: what `first` gains over it, within a seed
    """

    kind: str
    reference: str
    first: str
    gains: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]
    controls: Sequence[str]
    over: Mapping[str, Estimate]

    @property
    def better(self) -> list[str]:
        """Surely better than the reference, the best one first."""
        found = [name for name, one in self._methods.items() if one.low > 0]
        return sorted(found, key=lambda name: -self.differences[name].mean)

    @property
    def worse(self) -> list[str]:
        """Surely worse than the reference, the worst one first."""
        found = [name for name, one in self._methods.items() if one.high < 0]
        return sorted(found, key=lambda name: self.differences[name].mean)

    @property
    def _methods(self) -> dict[str, Estimate]:
        return {name: one for name, one in self.differences.items() if name not in self.controls}

    def text(self) -> str:
        """The advice as a paragraph."""
        expected, points = self.gains[self.first], f"{self.gains[self.first].text(sign='+')} points"
        if expected.half is None:
            return f"**{self.kind}.** One seed has no interval, so nothing follows: `{self.first}` {points}."
        if expected.low > 0:
            told = f"Try `{self.first}` first; expect {points} over the model without a merge."
        elif expected.high < 0:
            told = f"Leave the model as it is: `{self.first}`, which would be the first to try, loses ({points})."
        else:
            told = f"Try `{self.first}` first, but check it: {points} over the model without a merge may be nothing."
        return " ".join([f"**{self.kind}.** {told}", *self._beside_others(), *self._beside_controls()])

    def _beside_others(self) -> Iterator[str]:
        """How other methods compare with the reference."""
        count, better, worse = len(self._methods), self.better, self.worse
        if better:
            yield f"Better than `{self.reference}`: {self._listed(better)}."
        if worse:
            yield f"Worse than `{self.reference}`: {self._listed(worse)}."
        if count:
            rest = count - len(better) - len(worse)
            yield f"Not told from it: {rest} of {count} that were compared."

    def _beside_controls(self) -> Iterator[str]:
        """Whether the gain is more than that of the controls."""
        for name, one in self.over.items():
            sure = "more than" if one.low > 0 else "less than" if one.high < 0 else "not surely more than"
            yield f"It gains {sure} the control, {name} ({one.text(sign='+')})."

    def _listed(self, names: Sequence[str]) -> str:
        told = {name: self.differences[name] for name in names[:NAMED]}
        some = ", ".join(f"{name} {one.text(1 if abs(one.mean) >= 0.05 else 2, '+')}" for name, one in told.items())
        return some if len(names) <= NAMED else f"{some}, and {len(names) - NAMED} more"


def advise(
    kind: str,
    reference: str,
    without: Sequence[float],
    scores: Mapping[str, Sequence[float]],
    controls: Sequence[str] = (),
) -> Advice:
    """What follows from scores over seeds.

    What to try first is the reference, unless another is better by an interval over seeds that does not hold 0; of
    several the best.

    without  the score of the model without a merge, of each seed
    scores   of each merge, in the same order of seeds, in %
    """

    def minus(one: Sequence[float], other: Sequence[float]) -> Estimate:
        return estimate([a - b for a, b in zip(one, other, strict=True)])

    gains = {name: minus(own, without) for name, own in scores.items()}
    differences = {name: minus(own, scores[reference]) for name, own in scores.items() if name != reference}
    made = Advice(kind, reference, reference, gains, differences, controls, {})
    first = made.better[0] if made.better else reference
    over = {name: minus(scores[first], scores[name]) for name in controls}
    return replace(made, first=first, over=over)
