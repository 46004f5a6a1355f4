"""What the numbers of a kind of merge say: what to try first, how much to expect, and what did not help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from intervals import Estimate, estimate

__all__ = ["Advice", "advise"]

NAMED = 6  # in a sentence


@dataclass(frozen=True)
class Advice:
    """What follows for a kind of merge, all in points of the mean share of right answers.

    first       what to try first: the reference, unless another is better by an interval over seeds without 0
    expected    what `first` gains over the model without a merge
    beyond      what it gains over the reference, where it is another
    gains       of every merge over the model without one
    differences of every other merge to the reference, within a seed
    """

    kind: str
    reference: str
    first: str
    gains: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]

    @property
    def expected(self) -> Estimate:
        """What `first` gains over the model without a merge."""
        return self.gains[self.first]

    @property
    def better(self) -> list[str]:
        """Surely better than the reference, the best one first."""
        found = [name for name, one in self.differences.items() if one.low > 0]
        return sorted(found, key=lambda name: -self.differences[name].mean)

    @property
    def worse(self) -> list[str]:
        """Surely worse than the reference, the worst one first."""
        found = [name for name, one in self.differences.items() if one.high < 0]
        return sorted(found, key=lambda name: self.differences[name].mean)

    def text(self) -> str:
        """The advice as a paragraph."""
        told = f"**{self.kind}.** "
        if self.expected.half is None:
            return (
                f"{told}One seed has no interval, so nothing follows. `{self.first}` gained {self._points(self.first)}."
            )
        sure = "" if self.expected.low > 0 else ", which may be nothing"
        sure = sure if self.expected.high > 0 else ", a loss"
        told += f"Try `{self.first}` first: {self._points(self.first)} over the model without a merge{sure}."
        if self.better:
            told += f" Better than `{self.reference}`: {self._listed(self.better)}."
        told += f" {self._not_better()}"
        if self.worse:
            told += f" Worse: {self._listed(self.worse)}."
        return told

    def _not_better(self) -> str:
        unsure = len(self.differences) - len(self.better) - len(self.worse)
        return (
            f"Of the {len(self.differences)} others {len(self.better)} are better than `{self.reference}`, "
            f"{len(self.worse)} worse, and {unsure} are not told from it."
        )

    def _points(self, name: str) -> str:
        return f"{self.gains[name].text(sign='+')} points"

    def _listed(self, names: Sequence[str]) -> str:
        some = ", ".join(f"{name} {self.differences[name].text(sign='+')}" for name in names[:NAMED])
        return some if len(names) <= NAMED else f"{some}, and {len(names) - NAMED} more"


def advise(kind: str, reference: str, without: Sequence[float], scores: Mapping[str, Sequence[float]]) -> Advice:
    """What follows from scores over seeds.

    without  the score of the model without a merge, of each seed
    scores   of each merge, in the same order of seeds, in %
    """
    gains = {
        name: estimate([one - before for one, before in zip(own, without, strict=True)]) for name, own in scores.items()
    }
    differences = {
        name: estimate([one - other for one, other in zip(own, scores[reference], strict=True)])
        for name, own in scores.items()
        if name != reference
    }
    made = Advice(kind, reference, reference, gains, differences)
    return Advice(kind, reference, made.better[0], gains, differences) if made.better else made
