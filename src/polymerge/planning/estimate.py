"""Estimate the memory of a merge: its buffers, which depend only on the number of models and threads."""

from __future__ import annotations

import os
from math import prod
from typing import Final

from polymerge.methods.table import METHODS
from polymerge.planning.plan import Plan

__all__ = ["BLOCK", "TURNED", "default_threads", "memory_estimate"]

BLOCK = 1 << 19
"""Elements merged at a time: enough to make calls cheap, few enough to stay in a core's cache."""

TURNED: Final = 4
"""Factor by which blocks grow if rows are columns in a file."""

_MOST_THREADS = 8
_COPY_BUFFER = 4 << 20
_SELECTION = 64 << 20
_MATRICES = 4
_SELECTING = ("cutoff", "band", "selected", "importance")


def default_threads() -> int:
    """The default number of threads: the available processors, capped to limit memory and disk load."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, _MOST_THREADS)


def memory_estimate(plan: Plan, threads: int | None = None) -> int:
    """Upper bound on the bytes of buffers during a merge: blocks, file buffers and candidates for cutoffs."""
    threads = threads or default_threads()
    wide = any(step.dtype == "F64" for step in plan.steps if step.fate not in ("copied", "tied"))
    rows = len(plan.models) + (plan.base is not None)
    turned = [step for step in plan.steps if any(map(step.turns, step.pieces))]
    block = BLOCK * (TURNED if turned else 1)
    per_thread = block * (2 * rows + 3) * (8 if wide else 4) + _COPY_BUFFER
    # the matrices that its blocks lie among in the inputs, and those that they are put into in the output
    per_thread += max((_MATRICES * prod(step.shape[-2:]) * (8 if wide else 4) for step in turned), default=0)
    selecting = any(METHODS[setting.method].statistic in _SELECTING for setting in plan.settings)
    return threads * per_thread + (_SELECTION if selecting else 0)
