"""Deltas as whole matrices, for tests of methods that decompose them."""

from __future__ import annotations

import numpy as np

__all__ = ["away", "deltas_of"]


def deltas_of(seed, models=3, m=13, n=9, rank=None, dtype=np.float32):
    """Random deltas [models, m, n] with something in common, of this rank each if one is said."""
    draws = np.random.default_rng(seed)
    if rank is None:
        found = draws.standard_normal((models, m, n)) + 0.5 * draws.standard_normal((m, n))
    else:
        found = draws.standard_normal((models, m, rank)) @ draws.standard_normal((models, rank, n))
    return found.astype(dtype)


def away(got, wanted):
    """The distance of two matrices, relative to the norm of the second; the first's norm if that is zero."""
    norm = np.linalg.norm(wanted)
    return float(np.linalg.norm(got - wanted) / norm) if norm else float(np.linalg.norm(got))
