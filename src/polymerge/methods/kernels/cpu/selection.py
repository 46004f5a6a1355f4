"""Select entries by what all models say of them: a band of magnitudes, how many change it, how much they vary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polymerge.methods.kernels.compiled import compiled
from polymerge.methods.kernels.cpu.arithmetic import TILE, one_line

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
    _count_shared(*one_line(deltas), deltas.shape[1], deltas.dtype.type(epsilon), counts)
    return counts


def shared_sum(deltas: Floats, epsilon: float, unique: Sequence[float]) -> Floats:
    """See `polymerge.methods.kernels.shared_sum`."""
    out = np.empty(deltas.shape[1], deltas.dtype)
    _shared_sum(*one_line(deltas), deltas.dtype.type(epsilon), np.array(unique, deltas.dtype), out)
    return out


def variances(deltas: Floats) -> Floats:
    """See `polymerge.methods.kernels.variances`."""
    out = np.empty((1, deltas.shape[1]), deltas.dtype)
    _variances(*one_line(deltas), len(deltas), deltas.dtype.type(1 / len(deltas)), out[0])
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
def _count_shared(line: Floats, stride: int, n: int, epsilon: Any, counts: NDArray[np.int64]) -> None:
    changed = np.empty(TILE, np.int32)
    for start in range(0, n, TILE):
        end = min(start + TILE, n)
        changed[:] = 0
        for model in range(counts.shape[0]):
            row = line[model * stride + start : model * stride + end]
            for i in range(row.size):
                changed[i] += np.int32(abs(row[i]) > epsilon)
        for model in range(counts.shape[0]):
            row = line[model * stride + start : model * stride + end]
            all_of_it = shared = np.int32(0)
            for i in range(row.size):
                here = np.int32(abs(row[i]) > epsilon)
                all_of_it = np.int32(all_of_it + here)
                shared = np.int32(shared + (here & np.int32(changed[i] > 1)))
            counts[model, 0] += int(shared)
            counts[model, 1] += int(all_of_it - shared)


@compiled
def _shared_sum(line: Floats, stride: int, epsilon: Any, unique: Floats, out: Floats) -> None:
    zero, one = out.dtype.type(0), out.dtype.type(1)
    changed, alone = np.empty(TILE, out.dtype), np.empty(TILE, out.dtype)
    for start in range(0, out.size, TILE):
        total = out[start : start + TILE]
        for i in range(total.size):
            changed[i], total[i], alone[i] = zero, zero, one
        for model in range(unique.size):
            row, factor = line[model * stride + start : model * stride + start + total.size], unique[model]
            for i in range(row.size):
                here = abs(row[i]) > epsilon
                changed[i] += one if here else zero
                total[i] += row[i] if here else zero
                alone[i] = factor if here else alone[i]
        for i in range(total.size):
            total[i] = total[i] * alone[i] if changed[i] <= one else total[i] / changed[i]


@compiled
def _variances(line: Floats, stride: int, models: int, share: Any, out: Floats) -> None:
    zero, mean = out.dtype.type(0), np.empty(TILE, out.dtype)
    for start in range(0, out.size, TILE):
        total = out[start : start + TILE]
        for i in range(total.size):
            mean[i] = total[i] = zero
        for model in range(models):
            row = line[model * stride + start : model * stride + start + total.size]
            for i in range(row.size):
                mean[i] += row[i]
        for i in range(total.size):
            mean[i] *= share
        for model in range(models):
            row = line[model * stride + start : model * stride + start + total.size]
            for i in range(row.size):
                away = row[i] - mean[i]
                total[i] += away * away
        for i in range(total.size):
            total[i] *= share


@compiled
def _keep_scored(row: Floats, scores: Floats, least: Any) -> None:
    zero = row.dtype.type(0)
    for i in range(row.size):
        row[i] = row[i] if scores[i] >= least else zero
