"""The operations on blocks that merge methods are composed of, for numpy arrays and torch tensors.

A block holds the same stretch of every model's tensor as rows, [model, n], in the working dtype, float32 or float64;
the elements of a row are contiguous. What only reads weights (`subtract`, `weighted_sum`, `dots`, and `add_scaled` its
base) also takes rows of BF16 as they lie on disk, as uint16: widened where they are read, they need no pass of their
own and half the room in the cache. Numpy arrays are computed by compiled loops (`cpu`), torch tensors, wherever they
are, by torch (`tensor`). Both do the same roundings in the same order, so their results are equal bit for bit. Torch is
imported with the first tensor.

Weights are rounded once to the working dtype. Entry by entry nothing depends on where a block begins or how long it is;
`start` is the flat index of a block's first element in its tensor, and `dots` is taken on a grid.
"""

# mypy: disable-error-code="no-any-return"
# (which module it is depends on the block; both have all of these names)

from __future__ import annotations

from collections.abc import Sequence
from math import fsum
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from polymerge.methods.kernels import cpu
from polymerge.methods.kernels.cpu.arithmetic import CELL

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CELL",
    "AnyBlock",
    "Block",
    "add_low_rank",
    "add_scaled",
    "count_shared",
    "decode",
    "divergences",
    "dots",
    "elected_sum",
    "encode",
    "find_cutoffs",
    "finite",
    "gram_of",
    "join_rows",
    "keep_between",
    "keep_largest",
    "keep_random",
    "keep_ranked",
    "keep_scored",
    "limited",
    "magnitudes",
    "not_finite",
    "of_expert",
    "on_host",
    "rounded",
    "scored",
    "shared_sum",
    "subtract",
    "times_scales",
    "transposed",
    "variances",
    "weighted_sum",
]

Block: TypeAlias = "NDArray[Any] | Tensor"
"""A numpy array or a torch tensor; results are of the same kind as the arguments."""

AnyBlock = TypeVar("AnyBlock", "NDArray[Any]", "Tensor")


def _set_for(x: Block) -> ModuleType:
    if isinstance(x, np.ndarray):
        return cpu
    from polymerge.methods.kernels import tensor

    return tensor


def decode(raw: AnyBlock, dtype: str, out: AnyBlock) -> bool:
    """Decode numbers from the bytes of a file.

    raw     uint8 [bytes], aligned for its dtype
    dtype   BF16, F16, F32 or F64; F8_E4M3, F8_E5M2, or F8_E8M0, in which scales are powers of two
    out     [n], float32 or float64, is filled; only F64 into float32 is rounded
    returns whether all of `out` are finite
    """
    return _set_for(out).decode(raw, dtype, out)


def encode(values: AnyBlock, dtype: str, out: AnyBlock) -> bool:
    """Encode numbers as the bytes of a file, rounded once, to the nearest, ties to even.

    What is too large becomes an infinity, NaN stays NaN.

    values  [n], float32 or float64
    dtype   BF16, F16, F32 or F64
    out     uint8 [bytes], is filled; a tensor may lie on another device than `values`
    returns whether all numbers in `out` are finite
    """
    return _set_for(values).encode(values, dtype, out)


def rounded(x: AnyBlock, dtype: str) -> AnyBlock:
    """Round numbers [n], in place, to numbers of BF16, F16, F32 or F64."""
    return _set_for(x).rounded(x, dtype)


def not_finite(raw: NDArray[np.uint8], dtype: str) -> tuple[int, int]:
    """How many of the numbers in the bytes of a file are infinite, and how many are NaN.

    dtype   BF16, F16, F32 or F64
    """
    return cpu.not_finite(raw, dtype)


def finite(bits: NDArray[np.uint16]) -> bool:
    """Return whether all numbers in a row of raw BF16 bits are finite."""
    return cpu.finite(bits)


def subtract(x: AnyBlock, base: AnyBlock, out: AnyBlock | None = None) -> AnyBlock:
    """Subtract `base` [n] from every row of `x` [model, n], in place or into `out`.

    Rows of BF16 bits need an `out` in the working dtype.
    """
    return _set_for(x).subtract(x, base, out)


def add_scaled(base: AnyBlock, merged: AnyBlock, scale: float) -> AnyBlock:
    """Add `scale` times `merged` [n] to `base` [n], in place in one of them; the product is rounded, then the sum."""
    return _set_for(base).add_scaled(base, merged, scale)


def weighted_sum(x: AnyBlock, weight: Sequence[float]) -> AnyBlock:
    """Sum the weighted rows of `x` [model, n], in order; every product and every sum is rounded."""
    return _set_for(x).weighted_sum(x, weight)


def add_low_rank(out: AnyBlock, left: AnyBlock, right: AnyBlock, scale: float, first: int) -> None:
    """Add `scale` times elements `first` to `first + n` of `left @ right`, counted row by row, to `out` [n], in place.

    left [rows, rank] and right [rank, width] are in the dtype of `out`. The sum over the rank is taken in order, every
    product and every sum rounded; so is the product with `scale`.
    """
    _set_for(out).add_low_rank(out, left, right, scale, first)


def times_scales(out: AnyBlock, scales: AnyBlock, block: tuple[int, int], width: int, first: int) -> bool:
    """Multiply elements `first` to `first + n` of a matrix of rows of `width`, counted row by row, by scales, in place.

    out     float32 [n]
    scales  float32, one for each `block` of (rows, columns), the last of which may be cut off
    returns whether all of `out` are finite
    """
    return _set_for(out).times_scales(out, scales, block, width, first)


def find_cutoffs(deltas: AnyBlock, keep: Sequence[int]) -> list[float]:
    """Find the `keep[model]`-th largest magnitude of every row of `deltas` [model, n]; infinity for none to keep.

    For tensors in memory; `polymerge.engine.cutoffs` does it out of core.
    """
    return _set_for(deltas).find_cutoffs(deltas, keep)


def keep_largest(deltas: AnyBlock, cutoffs: Sequence[float]) -> AnyBlock:
    """Zero, in place, the entries of each row of `deltas` [model, n] whose magnitude is below the row's cutoff."""
    return _set_for(deltas).keep_largest(deltas, cutoffs)


def keep_random(deltas: AnyBlock, keys: Sequence[int], start: int, density: Sequence[float], rescale: bool) -> AnyBlock:
    """Zero, in place, all but a random share of the entries of each row of `deltas` [model, n].

    Element e (counted from the tensor's beginning) has a 32-bit word of its own: word e % 4 of Philox4x32-10 under the
    row's key at counter e // 4. It is kept if the word is below floor(density * 2**32): none at 0, all at 1.

    keys     64-bit integers, one per row
    density  in [0, 1], one per row
    rescale  whether to multiply what is kept by 1 / density, rounded to the working dtype
    """
    return _set_for(deltas).keep_random(deltas, keys, start, density, rescale)


def keep_ranked(
    deltas: AnyBlock,
    width: int,
    keys: Sequence[int],
    start: int,
    density: Sequence[float],
    epsilon: Sequence[float],
    factors: Sequence[float],
) -> AnyBlock:
    """Zero, in place, all but a random share of the entries of each model's rows of a matrix, rather small ones than
    large ones, and multiply what is kept.

    An entry has the rank r, from 0 to width - 1, of its magnitude in its row; equals share the mean of theirs. It is
    kept if its word, as in `keep_random`, is below floor((density - epsilon + 2 * epsilon * r / (width - 1)) * 2**32),
    which is floor(density * 2**32) in rows of one entry.

    deltas   [model, n]  whole rows of `width` entries
    start    flat index of the block's first element
    density  chance to be kept, on average, one per model; with `epsilon` more or less it is in [0, 1]
    factors  what kept entries are multiplied by, one per model, rounded to the working dtype
    """
    return _set_for(deltas).keep_ranked(deltas, width, keys, start, density, epsilon, factors)


def keep_between(deltas: AnyBlock, lows: Sequence[float], highs: Sequence[float]) -> AnyBlock:
    """Zero, in place, the entries of each row of `deltas` [model, n] whose magnitude is below its low or above its
    high.
    """
    return _set_for(deltas).keep_between(deltas, lows, highs)


def limited(deltas: AnyBlock, step: float) -> AnyBlock:
    """Multiply, in place, every entry of `deltas` [model, n] by min(step / max(|entry|, 1e-6), 1)."""
    return _set_for(deltas).limited(deltas, step)


def count_shared(deltas: AnyBlock, epsilon: float) -> NDArray[np.int64]:
    """For each model of `deltas` [model, n], the number of its entries above `epsilon` in magnitude where another
    model's is, too, and where none is: [model, 2].
    """
    return _set_for(deltas).count_shared(deltas, epsilon)


def shared_sum(deltas: AnyBlock, epsilon: float, unique: Sequence[float]) -> AnyBlock:
    """Average, entry by entry, those of the models' deltas [model, n] that exceed `epsilon`; one alone is multiplied by
    its model's `unique` factor.
    """
    return _set_for(deltas).shared_sum(deltas, epsilon, unique)


def variances(deltas: AnyBlock) -> AnyBlock:
    """The variance over the models of each entry of `deltas` [model, n]: [1, n], divided by the number of models."""
    return _set_for(deltas).variances(deltas)


def keep_scored(deltas: AnyBlock, scores: AnyBlock, least: float) -> AnyBlock:
    """Zero, in place, the entries of all rows of `deltas` [model, n] whose score [n] is below `least`."""
    return _set_for(deltas).keep_scored(deltas, scores, least)


def elected_sum(deltas: AnyBlock, weight: Sequence[float], elect: str, normalize: str) -> AnyBlock:
    """Elect a sign per entry and sum the agreeing entries: `deltas` [model, n] to [n].

    elect      weighted: the sign of the sum of weight * delta; a model agrees if its weight * delta has that sign
               unweighted: the sign of the sum of deltas; a model agrees if its delta has it
               A sum of zero counts as plus; a zero agrees with neither sign.
    normalize  the divisor of the sum of weight * delta over the agreeing models:
               weight (the sum of their weights), count (their number), none.
               A sum of weights below 1e-8 in magnitude is not divided by.
    """
    return _set_for(deltas).elected_sum(deltas, weight, elect, normalize)


def dots(x: AnyBlock, size: int = CELL) -> NDArray[np.float64]:
    """Dot products of the rows of `x` [model, n] with each other, for every `size` elements: [cell, model, model].

    A cell's sum is taken in float64 in a fixed order. Give it blocks that begin at multiples of `CELL` and add up the
    cells with `math.fsum`: the total then depends neither on the blocks nor on their order.
    """
    return _set_for(x).dots(x, size)


def gram_of(x: AnyBlock) -> NDArray[np.float64]:
    """Dot products of full tensors with each other, [model, model], from a block [model, n] that holds all of them."""
    cells, models = dots(x), range(len(x))
    return np.array([[fsum(cells[:, one, other]) for other in models] for one in models])


def magnitudes(x: AnyBlock, size: int) -> NDArray[np.float64]:
    """The sum of magnitudes of every `size` elements of each row of `x` [model, n]: [cell, model], in float64 and in a
    fixed order.
    """
    return _set_for(x).magnitudes(x, size)


def divergences(base: AnyBlock, deltas: AnyBlock, width: int) -> NDArray[np.float64]:
    """The Kullback-Leibler divergence of each row of base + delta from the base's, as probabilities: [model, row].

    A row's probabilities are its softmax plus 1e-8. In float64, with exponentials, logarithms and sums that are the
    same on every device; not negative.

    base    [n]         whole rows of `width` entries
    deltas  [model, n]
    """
    return _set_for(deltas).divergences(base, deltas, width)


def scored(deltas: AnyBlock, per_row: NDArray[np.float64], width: int) -> AnyBlock:
    """The magnitudes of `deltas` [model, n], each times the number of its row of `width` entries, [model, row]; at most
    the largest number of their dtype.
    """
    return _set_for(deltas).scored(deltas, per_row, width)


def of_expert(a: AnyBlock, b: AnyBlock, expert: int, experts: int) -> tuple[AnyBlock, AnyBlock]:
    """Copies of the factors of one of several updates, [rank, in] and [out, rank].

    a   [experts * rank, in], one expert after the other
    b   [out, rank * experts], all experts of one rank side by side
    """
    own_a, own_b = a.reshape(experts, -1, a.shape[1])[expert], b.reshape(len(b), -1, experts)[:, :, expert]
    return own_a.copy() if isinstance(own_a, np.ndarray) else own_a.clone(), transposed(own_b.T)


def transposed(x: AnyBlock) -> AnyBlock:
    """The transpose of a matrix, contiguous in memory."""
    return np.ascontiguousarray(x.T) if isinstance(x, np.ndarray) else x.T.contiguous()


def join_rows(rows: Sequence[AnyBlock]) -> AnyBlock:
    """The rows [n] one after the other."""
    if isinstance(rows[0], np.ndarray):
        return np.concatenate(rows)
    import torch

    return torch.cat(list(rows))


def on_host(x: Block) -> NDArray[Any]:
    """The block as a numpy array, copied only if it is on another device."""
    return x if isinstance(x, np.ndarray) else x.detach().cpu().numpy()
