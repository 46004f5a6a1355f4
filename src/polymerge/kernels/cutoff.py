"""How far down a trimmed delta reaches."""

from __future__ import annotations

from math import inf
from typing import NamedTuple

__all__ = ["Cutoff"]


class Cutoff(NamedTuple):
    """What of one model's delta is kept: magnitudes above `threshold`, and those equal to it that lie before `end`.

    With the place in it the rule is exact however many entries share the threshold, and still looks at one entry at a
    time, so blocks can be trimmed in any order. In a tensor that starts at `offset` of what was counted together, the
    rule is `Cutoff(threshold, end - offset)`.
    """

    threshold: float
    end: int

    @classmethod
    def nothing(cls) -> Cutoff:
        """Keep no entry."""
        return cls(inf, 0)

    @classmethod
    def everything(cls, n: int) -> Cutoff:
        """Keep all of `n` entries. Right also wherever the threshold is zero: to keep a zero changes nothing."""
        return cls(0.0, n)
