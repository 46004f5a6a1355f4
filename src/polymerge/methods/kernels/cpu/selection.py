"""Select entries by what all models say of them: a band of magnitudes, how many change it, how much they vary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polymerge.methods.kernels.compiled import compiled

__all__ = ["count_shared", "keep_between", "keep_scored", "limited", "shared_sum", "variances"]

Floats = NDArray[Any]


def keep_between(deltas: Floats, lows: Sequence[float], highs: Sequence[float]) -> Floats:
    """See `polymerge.methods.kernels.keep_between`."""
    for row, low, high in zip(deltas, lows, highs, strict=True):
        _keep_between(row, row.dtype.type(low), row.dtype.type(high))
    return deltas


def limited(deltas: Floats, step: float) -> Floats:
    """See `polymerge.methods.kernels.limited`."""
    for row in deltas:
        _limit(row, row.dtype.type(step), row.dtype.type(1e-6))
    return deltas


def count_shared(deltas: Floats, epsilon: float) -> NDArray[np.int64]:
    """See `polymerge.methods.kernels.count_shared`."""
    counts = np.zeros((len(deltas), 2), np.int64)
    _count_shared(np.ascontiguousarray(deltas), deltas.dtype.type(epsilon), counts)
    return counts


def shared_sum(deltas: Floats, epsilon: float, unique: Sequence[float]) -> Floats:
    """See `polymerge.methods.kernels.shared_sum`."""
    out = np.empty(deltas.shape[1], deltas.dtype)
    _shared_sum(np.ascontiguousarray(deltas), deltas.dtype.type(epsilon), np.array(unique, deltas.dtype), out)
    return out


def variances(deltas: Floats) -> Floats:
    """See `polymerge.methods.kernels.variances`."""
    out = np.empty((1, deltas.shape[1]), deltas.dtype)
    _variances(np.ascontiguousarray(deltas), deltas.dtype.type(1 / len(deltas)), out[0])
    return out


def keep_scored(deltas: Floats, scores: Floats, least: float) -> Floats:
    """See `polymerge.methods.kernels.keep_scored`."""
    with np.errstate(over="ignore"):  # no score is above a limit that no number of their dtype reaches
        limit = scores.dtype.type(least)
    for row in deltas:
        _keep_scored(row, scores, limit)
    return deltas


@compiled
def _keep_between(row: Floats, low: Any, high: Any) -> None:
    zero = row.dtype.type(0)
    for i in range(row.size):
        row[i] = row[i] if low <= abs(row[i]) <= high else zero


@compiled
def _limit(row: Floats, step: Any, least: Any) -> None:
    one = row.dtype.type(1)
    for i in range(row.size):
        row[i] = row[i] * min(step / max(abs(row[i]), least), one)


@compiled
def _count_shared(deltas: Floats, epsilon: Any, counts: NDArray[np.int64]) -> None:
    models, n = deltas.shape
    for i in range(n):
        changed = 0
        for model in range(models):
            changed += abs(deltas[model, i]) > epsilon
        for model in range(models):
            if abs(deltas[model, i]) > epsilon:
                counts[model, 0 if changed > 1 else 1] += 1


@compiled
def _shared_sum(deltas: Floats, epsilon: Any, unique: Floats, out: Floats) -> None:
    models, n = deltas.shape
    zero, one = out.dtype.type(0), out.dtype.type(1)
    for i in range(n):
        changed, total, alone = zero, zero, one
        for model in range(models):
            if abs(deltas[model, i]) > epsilon:
                changed += one
                total += deltas[model, i]
                alone = unique[model]
        out[i] = total * alone if changed <= one else total / changed


@compiled
def _variances(deltas: Floats, share: Any, out: Floats) -> None:
    models, n = deltas.shape
    zero = out.dtype.type(0)
    for i in range(n):
        mean = zero
        for model in range(models):
            mean += deltas[model, i]
        mean *= share
        total = zero
        for model in range(models):
            away = deltas[model, i] - mean
            total += away * away
        out[i] = total * share


@compiled
def _keep_scored(row: Floats, scores: Floats, least: Any) -> None:
    zero = row.dtype.type(0)
    for i in range(row.size):
        row[i] = row[i] if scores[i] >= least else zero
