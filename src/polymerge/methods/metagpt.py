"""MetaGPT: task arithmetic whose weights follow from the sizes of the deltas."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from polymerge.methods.kernels import AnyBlock, gram_of, weighted_sum

__all__ = ["metagpt"]


def metagpt(deltas: AnyBlock, *, gram: NDArray[np.float64] | None = None) -> AnyBlock:
    """Sum the deltas, each weighted by its share of all squared norms.

    Zhou et al. 2024, arXiv:2406.11385: the weight of model t is |delta_t|^2 / sum_k |delta_k|^2, with norms over the
    whole model. AdaMMS compares with it, and its code takes the norms in the checkpoint's own precision, where
    those of half-precision models overflow to NaN; here they are sums in float64. Where no model differs from the base
    all weights are zero.

    deltas   [model, n]  float32 or float64
    gram     [model, model]  dot products of the whole models' deltas; else those of `deltas`
    returns  [n]         the merged delta
    """
    squares = np.diagonal(gram_of(deltas) if gram is None else gram)
    total = float(squares.sum())
    return weighted_sum(deltas, [float(square) / total if total > 0 else 0.0 for square in squares])
