"""What holds over seeds: means with t-intervals, and beside them the error of the questions within a seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import fmean, stdev
from typing import Any

from scipy import stats

__all__ = ["Estimate", "error_within", "estimate", "mean_share", "share"]


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
        mean = round(self.mean, digits) + 0.0  # no minus before a zero
        return f"{mean:{sign}.{digits}f}{half}"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value of each seed, with a t-interval: seeds are independent training runs of one kind."""
    count = len(values)
    half = float(stats.t.ppf(0.975, count - 1)) * stdev(values) / math.sqrt(count) if count > 1 else None
    return Estimate(fmean(values), half, count)


def share(counts: Sequence[int]) -> float:
    """Right answers in %."""
    right, asked = counts
    return 100 * right / asked


def mean_share(exam: Mapping[str, Any], groups: Sequence[str]) -> float:
    """The mean share of some groups in %, each as important as the others; the same for what is equal exactly."""
    return float(100 * sum(Fraction(*exam[group]) for group in groups) / len(groups))


def error_within(exam: Mapping[str, Any], groups: Sequence[str]) -> float:
    """The standard error of that mean for other questions to the same models, in points, questions independent."""
    shares = [(share(exam[group]) / 100, exam[group][1]) for group in groups]
    return 100 * math.sqrt(sum(p * (1 - p) / asked for p, asked in shares)) / len(shares)
