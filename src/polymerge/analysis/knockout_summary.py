"""How sure one may be of a drop, and in which third of the layers the drops are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from polymerge.analysis.cells import THIRDS, Cell, third_of
from polymerge.analysis.scoring_prompts import Marks

__all__ = ["RESAMPLES", "Drops", "drops", "interval", "resampled", "thirds"]

RESAMPLES = 2000
_UNDEFINED = 0.025  # of the resamples; with more of them a percentile interval has no ends
Floats = Any


@dataclass(frozen=True)
class Drops:
    """Of one model on one task, what each cell's score lies below that of the model as it is, in points.

    values     [cell]
    resampled  [resample, cell], the same on prompts drawn with replacement; None where prompts have no scores
    """

    values: Floats
    resampled: Floats | None


def resampled(marks: Sequence[Marks], task: str, seed: int, count: int = RESAMPLES) -> Floats | None:
    """Scores on prompts drawn with replacement, in percent: [resample, marks]; the same prompts for all of the marks.

    None where a score is no mean over prompts. The draws depend on seed, task and the number of prompts.
    """
    import numpy as np

    rows = [one.samples for one in marks]
    if any(row is None for row in rows):
        return None
    samples = np.array(rows, np.float64)
    dice = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}\0{task}".encode()).digest()[:8], "little"))
    found = np.empty((count, len(samples)))
    for place in range(count):
        found[place] = samples[:, dice.integers(0, samples.shape[1], samples.shape[1])].mean(axis=1)
    return 100 * found


def drops(baseline: Marks, cells: Sequence[Marks], task: str, seed: int) -> Drops:
    """What knocking out each cell costs on a task."""
    import numpy as np

    drawn = resampled([baseline, *cells], task, seed)
    values = baseline.score - np.array([one.score for one in cells], np.float64)
    return Drops(values, None if drawn is None else drawn[:, :1] - drawn[:, 1:])


def interval(values: Floats | None) -> list[float] | None:
    """The percentile interval that holds 95 % of resampled values; None where there are none."""
    import numpy as np

    return None if values is None else [float(end) for end in np.percentile(values, (2.5, 97.5))]


def thirds(found: Drops, cells: Sequence[Cell], depth: int) -> dict[str, Any]:
    """Where the drops are: their sum, their mean and their share of the whole in each third of the layers.

    A cell is of the third that its middle lies in. The shares add up to 1; they are None where knocking out costs
    nothing in all, and their intervals are None where that happens in more than 2.5 % of the resamples.
    """
    total = float(found.values.sum())
    again = None if found.resampled is None else found.resampled.sum(axis=1)
    undefined = None if again is None else float((again <= 0).mean())
    sure = undefined is not None and undefined <= _UNDEFINED
    told: dict[str, Any] = {"drop": total, "interval": interval(again), "undefined": undefined}
    for third in THIRDS:
        places = [place for place, cell in enumerate(cells) if third_of(cell.layers, depth) == third]
        own = float(found.values[places].sum())
        drawn = None if found.resampled is None else found.resampled[:, places].sum(axis=1)
        count = len(places)
        shares = None
        if sure and drawn is not None and again is not None:
            shares = interval((drawn[again > 0] / again[again > 0]) if (again > 0).any() else None)
        told[third] = {
            "cells": count,
            "drop": own,
            "mean": own / count if count else None,
            "mean_interval": interval(drawn / count) if count and drawn is not None else None,
            "share": own / total if total > 0 else None,
            "share_interval": shares if total > 0 else None,
        }
    return told
