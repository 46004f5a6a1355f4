"""What holds over seeds: means with t-intervals, and beside them the error of the questions within a seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

__all__ = ["Estimate", "error_within", "estimate", "mean_share", "share"]

# 97.5 % of Student's t for 1 to 30 degrees of freedom
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its 95 % t-interval; no width of a single seed."""

    mean: float
    half: float | None
    seeds: int

    @property
    def low(self) -> float:
        """The lower end; minus infinity without an interval."""
        return self.mean - (math.inf if self.half is None else self.half)

    @property
    def high(self) -> float:
        """The upper end; infinity without an interval."""
        return self.mean + (math.inf if self.half is None else self.half)

    def text(self, digits: int = 1, sign: str = "") -> str:
        """Mean and half width."""
        half = "" if self.half is None else f" ± {self.half:.{digits}f}"
        return f"{self.mean:{sign}.{digits}f}{half}"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value of each seed, with a t-interval: seeds are independent training runs of one kind."""
    count = len(values)
    half = _T[min(count - 1, len(_T)) - 1] * stdev(values) / math.sqrt(count) if count > 1 else None
    return Estimate(fmean(values), half, count)


def share(counts: Sequence[int]) -> float:
    """Right answers in %."""
    right, asked = counts
    return 100 * right / asked


def mean_share(exam: Mapping[str, Any], groups: Sequence[str]) -> float:
    """The mean share of some groups in %, each as important as the others."""
    return fmean(share(exam[group]) for group in groups)


def error_within(exam: Mapping[str, Any], groups: Sequence[str]) -> float:
    """The standard error of that mean for other questions to the same models, in points, questions independent."""
    shares = [(share(exam[group]) / 100, exam[group][1]) for group in groups]
    return 100 * math.sqrt(sum(p * (1 - p) / asked for p, asked in shares)) / len(shares)
