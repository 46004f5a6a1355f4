"""How sure one may be of a difference: the paired bootstrap.

Efron and Tibshirani 1993, chapter 13 (percentile interval). Questions are drawn with replacement, the same ones for
both models, and the difference of the means is taken anew each time. Questions count as independent; where several are
about one picture the intervals are somewhat too narrow.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEVEL", "RESAMPLES", "SEED", "interval", "resampled_means"]

RESAMPLES, SEED, LEVEL = 10_000, 1, 0.95
_AT_ONCE = 2_000_000  # numbers in memory

Floats = NDArray[np.float64]


def resampled_means(differences: Sequence[Floats], task: str, resamples: int = RESAMPLES, seed: int = SEED) -> Floats:
    """The means of per-question differences over resampled questions; all rows see the same questions each time.

    differences  [row][question]
    task         with the seed decides what is drawn, so that no other task or model changes it
    returns      [row, resample]
    """
    table = np.stack(list(differences))
    count = table.shape[1]
    dice = np.random.default_rng([seed, zlib.crc32(task.encode())])
    means = np.empty((len(table), resamples))
    rows = max(1, _AT_ONCE // count)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn = dice.integers(0, count, size=(size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        means[:, start : start + size] = table @ times.T / count
    return means


def interval(means: Floats, level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of resampled means."""
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
