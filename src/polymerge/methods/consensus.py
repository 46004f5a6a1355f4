"""Methods that look at each entry of all deltas together: who changes it, and how much they differ."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from polymerge.errors import RecipeError
from polymerge.methods.kernels import (
    AnyBlock,
    count_shared,
    divergences,
    elected_sum,
    find_cutoffs,
    gram_of,
    keep_scored,
    limited,
    on_host,
    scored,
    shared_sum,
    variances,
    weighted_sum,
)

__all__ = ["Selected", "arcee_fusion", "nearswap", "outlying", "quartiles", "ram", "ramplus_tl", "sce"]


class Selected(NamedTuple):
    """What `sce` selects of a tensor: entries of at least this variance, and their squares' sum for each model."""

    least: float
    squares: Sequence[float]


def sce(deltas: AnyBlock, select_topk: float = 1.0, *, selected: Selected | None = None) -> AnyBlock:
    """Select the entries that vary most, weigh the models by the squares of these, erase minority signs, and average.

    Wan et al. 2024, arXiv:2408.07990 (FuseChat), section 3.3: select, calculate, erase. The variance is over the
    models, and `int(select_topk * m)` of the m entries where it is not 0 are selected, and all that equal the last of
    these; a model's weight is its share of all squares of selected entries, equal for all if they add up to less than
    1e-6 of the entries; an entry is erased where its sign is not that of the sum of all deltas (0 counts as plus).

    deltas       [model, n]  float32 or float64; overwritten
    select_topk  share of the entries that are selected, in [0, 1]
    selected     for a block of a larger tensor; else found in `deltas`
    returns      [n]         the merged delta
    raises       RecipeError for a share out of range
    """
    if not 0 <= select_topk <= 1:
        raise RecipeError(f"select_topk: {select_topk} is not in [0, 1]")
    models, n = deltas.shape
    if selected is None:
        scores = variances(deltas)
        count = int(int(np.count_nonzero(on_host(scores))) * select_topk)
        least = 0.0 if select_topk == 1 else find_cutoffs(scores, [count])[0]
        keep_scored(deltas, scores[0], least)
        selected = Selected(least, [float(square) / n for square in np.diagonal(gram_of(deltas))])
    elif selected.least > 0:
        keep_scored(deltas, variances(deltas)[0], selected.least)
    total = fsum(selected.squares)
    weights = [square / total for square in selected.squares] if total >= 1e-6 else [1 / models] * models
    return elected_sum(deltas, weights, "unweighted", "weight")


def nearswap(deltas: AnyBlock, t: float) -> AnyBlock:
    """Move the base towards a model by at most `t` per entry, so that entries which are near take its values.

    alchemonaut's NearSwap, as in mergekit: the delta times min(t / |delta|, 1), with |delta| taken as 1e-6 at least.

    deltas   [1, n]  float32 or float64; overwritten
    t        not negative
    returns  [n]     the merged delta
    raises   RecipeError for more than one model, or a negative `t`
    """
    if len(deltas) != 1 or t < 0:
        raise RecipeError(f"nearswap: takes one model beside base_model, and a t from 0, got {len(deltas)} and {t}")
    return weighted_sum(limited(deltas, t), [1.0])


def arcee_fusion(
    deltas: AnyBlock, *, importance: float | None = None, base: AnyBlock, width: int | None = None
) -> AnyBlock:
    """Move the base to one model in the entries where that changes most, and in rows that change most.

    Arcee's method, as in mergekit: an entry's importance is the magnitude of its delta times the Kullback-Leibler
    divergence of its row from the base's, where a row's probabilities are its softmax plus 1e-8. Entries as important
    as the median and 1.5 times the range from the first quartile to the third are taken. mergekit finds these three in
    a random million of the entries of larger tensors; here they are of the whole tensor. It computes divergences in
    float32, whose rounding is larger than those of models that differ little (2e-8 for deltas of 2e-4), and then takes
    other entries; here they are computed in float64.

    deltas      [1, n]  float32 or float64; overwritten
    importance  the least importance that is taken, if `deltas` is a block of a larger tensor
    base        [n]     the base's numbers
    width       entries of each row; None for a single row
    returns     [n]     the merged delta
    raises      RecipeError for more than one model
    """
    if len(deltas) != 1:
        raise RecipeError(f"arcee_fusion: takes one model beside base_model, got {len(deltas)}")
    width = width or deltas.shape[1]
    scores = scored(deltas, divergences(base, deltas, width), width)
    if importance is None:
        ordered = np.sort(on_host(scores)[0])
        importance = outlying([float(ordered[place]) for place in quartiles(ordered.size)])
    return weighted_sum(keep_scored(deltas, scores[0], importance), [1.0])


def quartiles(n: int) -> tuple[int, int, int]:
    """The places of the three quartiles among `n` ascending numbers, counted from 0."""
    return (n - 1) // 4, (n - 1) // 2, 3 * (n - 1) // 4


def outlying(three: Sequence[float]) -> float:
    """The importance from which entries are taken, from its three quartiles."""
    first, median, third = three
    return median + 1.5 * (third - first)


def ram(deltas: AnyBlock, epsilon: float = 1e-5) -> AnyBlock:
    """Average the entries that several models change, and take over those that only one does.

    Reinforced Agent Merging, arXiv:2601.13572, as in mergekit: an entry is changed where its delta exceeds `epsilon`.

    deltas   [model, n]  float32 or float64
    epsilon  magnitude up to which a delta counts as no change
    returns  [n]         the merged delta
    """
    return shared_sum(deltas, epsilon, [1.0] * len(deltas))


def ramplus_tl(
    deltas: AnyBlock,
    r: float = 0.1,
    alpha: float = 0.2,
    epsilon: float = 1e-5,
    *,
    overlap: NDArray[np.int64] | None = None,
) -> AnyBlock:
    """Like `ram`, with what only one model changes enlarged by how much else of that model's is shared.

    Reinforced Agent Merging, arXiv:2601.13572, the tensor-local form that mergekit has: the factor of a model is
    1 + r * min(shared / unique, alpha), of the numbers of its changed entries in the tensor that others change, too,
    and that they do not.

    deltas   [model, n]  float32 or float64
    r        factor of the ratio
    alpha    upper bound of the ratio
    epsilon  magnitude up to which a delta counts as no change; also the least divisor
    overlap  [model, 2]  shared and unique entries of the whole tensor; else counted in `deltas`
    returns  [n]         the merged delta
    """
    counts = count_shared(deltas, epsilon) if overlap is None else overlap
    ratios = [float(shared) / max(float(unique), epsilon, 1e-300) for shared, unique in counts]
    return shared_sum(deltas, epsilon, [1 + r * min(max(ratio, 0.0), alpha) for ratio in ratios])
