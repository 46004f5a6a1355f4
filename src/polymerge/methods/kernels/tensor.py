"""The kernels for torch tensors, on any device: plain torch operations, each of which rounds once.

They are the loops of `cpu` written out operation by operation; sums over elements are in `tensor_sums`. Nothing here
may fuse a product with a sum (`addcmul`, `lerp`, `alpha=`), and no sum over elements may be left to torch, whose order
is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polymerge.methods.kernels.cpu.ranking import chances
from polymerge.methods.kernels.tensor_sums import divergences, dots, magnitudes

__all__ = [
    "add_low_rank",
    "add_scaled",
    "count_shared",
    "decode",
    "divergences",
    "dots",
    "elected_sum",
    "encode",
    "find_cutoffs",
    "keep_between",
    "keep_largest",
    "keep_random",
    "keep_ranked",
    "keep_scored",
    "limited",
    "magnitudes",
    "rounded",
    "scored",
    "shared_sum",
    "subtract",
    "times_scales",
    "variances",
    "weighted_sum",
]

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}


def _rounded(number: float, like: Tensor) -> float:
    return float(np.float32(number)) if like.dtype == torch.float32 else float(number)


def decode(raw: Tensor, dtype: str, out: Tensor) -> bool:
    """See `polymerge.methods.kernels.decode`."""
    out.copy_(raw.view(DTYPES.get(dtype) or _FP8[dtype]))
    return bool(torch.isfinite(out).all())


def encode(values: Tensor, dtype: str, out: Tensor) -> bool:
    """See `polymerge.methods.kernels.encode`."""
    if values.dtype == torch.float64 and dtype in ("BF16", "F16"):
        values = _round_to_odd(values)
    encoded = values.to(DTYPES[dtype])
    out.copy_(encoded.view(torch.uint8))
    return bool(torch.isfinite(encoded).all())


def rounded(x: Tensor, dtype: str) -> Tensor:
    """See `polymerge.methods.kernels.rounded`."""
    raw = torch.empty(x.numel() * DTYPES[dtype].itemsize, dtype=torch.uint8, device=x.device)
    encode(x, dtype, raw)
    decode(raw, dtype, x)
    return x


def _round_to_odd(values: Tensor) -> Tensor:
    """See `polymerge.methods.kernels.cpu.formats`: by way of float32 without rounding twice."""
    near = values.to(torch.float32)
    bits = near.view(torch.int32)
    cut = bits - (near.to(torch.float64).abs() > values.abs()).to(torch.int32)
    return torch.where(near.to(torch.float64) == values, bits, cut | 1).view(torch.float32)


def subtract(x: Tensor, base: Tensor, out: Tensor | None = None) -> Tensor:
    """See `polymerge.methods.kernels.subtract`."""
    if out is not None:
        return torch.sub(x, base, out=out)
    return x.sub_(base)


def add_scaled(base: Tensor, merged: Tensor, scale: float) -> Tensor:
    """See `polymerge.methods.kernels.add_scaled`."""
    return base.add_(merged * _rounded(scale, base))


def weighted_sum(x: Tensor, weight: Sequence[float]) -> Tensor:
    """See `polymerge.methods.kernels.weighted_sum`."""
    total = x[0] * _rounded(weight[0], x)
    for row, share in zip(x[1:], weight[1:], strict=True):
        total += row * _rounded(share, x)
    return total


def add_low_rank(out: Tensor, left: Tensor, right: Tensor, scale: float, first: int) -> None:
    """See `polymerge.methods.kernels.add_low_rank`."""
    width = right.shape[1]
    begin = first // width
    rows = left[begin : -(-(first + len(out)) // width)]
    total = torch.zeros((len(rows), width), dtype=out.dtype, device=out.device)
    for k in range(len(right)):
        total += rows[:, k : k + 1] * right[k]
    offset = first - begin * width
    out += total.view(-1)[offset : offset + len(out)] * _rounded(scale, out)


def times_scales(out: Tensor, scales: Tensor, block: tuple[int, int], width: int, first: int) -> bool:
    """See `polymerge.methods.kernels.times_scales`."""
    place = torch.arange(first, first + len(out), device=out.device)
    out *= scales[place // width // block[0], place % width // block[1]]
    return bool(torch.isfinite(out).all())


def find_cutoffs(deltas: Tensor, keep: Sequence[int]) -> list[float]:
    """See `polymerge.methods.kernels.find_cutoffs`."""
    return [_find_cutoff(row, count) for row, count in zip(deltas, keep, strict=True)]


def _find_cutoff(row: Tensor, count: int) -> float:
    n = row.numel()
    if count <= 0:
        return inf
    if count >= n:
        return 0.0
    return float(row.abs().sort().values[n - count])


def keep_largest(deltas: Tensor, cutoffs: Sequence[float]) -> Tensor:
    """See `polymerge.methods.kernels.keep_largest`."""
    for row, cutoff in zip(deltas, cutoffs, strict=True):
        row.masked_fill_(row.abs() < cutoff, 0)
    return deltas


def keep_random(deltas: Tensor, keys: Sequence[int], start: int, density: Sequence[float], rescale: bool) -> Tensor:
    """See `polymerge.methods.kernels.keep_random`."""
    for row, key, share in zip(deltas, keys, density, strict=True):
        if share < 1:
            limit = int(share * 2**32)
            factor = _rounded(1 / share if rescale and limit else 1, row)
            row.mul_(factor).masked_fill_(_words(row, key, start) >= limit, 0)
    return deltas


def keep_ranked(
    deltas: Tensor,
    width: int,
    keys: Sequence[int],
    start: int,
    density: Sequence[float],
    epsilon: Sequence[float],
    factors: Sequence[float],
) -> Tensor:
    """See `polymerge.methods.kernels.keep_ranked`."""
    for row, key, share, away, factor in zip(deltas, keys, density, epsilon, factors, strict=True):
        low, step = chances(share, away, width)
        sizes = row.abs().view(-1, width)
        ordered = sizes.sort(dim=1).values
        twice = torch.searchsorted(ordered, sizes) + torch.searchsorted(ordered, sizes, right=True) - 1
        limits = twice.to(torch.float64).mul_(step).add_(low).floor_()
        row.mul_(_rounded(factor, row)).masked_fill_(_words(row, key, start) >= limits.view(-1), 0)
    return deltas


def keep_between(deltas: Tensor, lows: Sequence[float], highs: Sequence[float]) -> Tensor:
    """See `polymerge.methods.kernels.keep_between`."""
    for row, low, high in zip(deltas, lows, highs, strict=True):
        sizes = row.abs()
        row.masked_fill_((sizes < low) | (sizes > high), 0)
    return deltas


def limited(deltas: Tensor, step: float) -> Tensor:
    """See `polymerge.methods.kernels.limited`."""
    sizes = deltas.abs().clamp_(min=_rounded(1e-6, deltas))
    return deltas.mul_((torch.full_like(sizes, _rounded(step, sizes)) / sizes).clamp_(max=1))


def count_shared(deltas: Tensor, epsilon: float) -> NDArray[np.int64]:
    """See `polymerge.methods.kernels.count_shared`."""
    changed = deltas.abs() > _rounded(epsilon, deltas)
    shared = changed.sum(dim=0) > 1
    counts = torch.stack(((changed & shared).sum(dim=1), (changed & ~shared).sum(dim=1)), dim=1)
    return counts.cpu().numpy()


def shared_sum(deltas: Tensor, epsilon: float, unique: Sequence[float]) -> Tensor:
    """See `polymerge.methods.kernels.shared_sum`."""
    changed = deltas.abs() > _rounded(epsilon, deltas)
    count = changed.sum(dim=0).to(deltas.dtype)
    total, alone = torch.zeros_like(deltas[0]), torch.ones_like(deltas[0])
    for row, own, factor in zip(deltas, changed, unique, strict=True):
        total += torch.where(own, row, torch.zeros_like(row))
        alone.masked_fill_(own, _rounded(factor, alone))
    return torch.where(count <= 1, total * alone, total / count)


def variances(deltas: Tensor) -> Tensor:
    """See `polymerge.methods.kernels.variances`."""
    share = _rounded(1 / len(deltas), deltas)
    mean, total = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for row in deltas:
        mean += row
    mean *= share
    for row in deltas:
        away = row - mean
        total += away * away
    return (total * share).unsqueeze(0)


def keep_scored(deltas: Tensor, scores: Tensor, least: float) -> Tensor:
    """See `polymerge.methods.kernels.keep_scored`."""
    return deltas.masked_fill_(scores < least, 0)


def scored(deltas: Tensor, per_row: NDArray[np.float64], width: int) -> Tensor:
    """See `polymerge.methods.kernels.scored`."""
    factors = torch.from_numpy(per_row).to(deltas.device, deltas.dtype)
    rows = deltas.abs().view(len(deltas), -1, width) * factors.unsqueeze(2)
    return rows.clamp_(max=torch.finfo(rows.dtype).max).view(deltas.shape)


def _words(row: Tensor, key: int, start: int) -> Tensor:
    """The random words of the elements of a row."""
    words = _philox(int(key), start // 4, -(-(start % 4 + row.numel()) // 4), row.device)
    return words[start % 4 : start % 4 + row.numel()]


def _philox(key: int, counter: int, count: int, device: torch.device) -> Tensor:
    """The words of `count` counters from `counter` on; see `polymerge.methods.kernels.cpu.trimming.philox`."""
    low = 0xFFFFFFFF
    place = torch.arange(counter, counter + count, device=device)
    a, b, c, d = place & low, place >> 32, torch.zeros_like(place), torch.zeros_like(place)
    key_0, key_1 = key & low, key >> 32
    for _ in range(10):
        # the products have 64 bits and wrap around to negative numbers; the mask after the shift mends that
        product_0, product_1 = a * 0xD2511F53, c * 0xCD9E8D57
        a, c = (product_1 >> 32 & low) ^ b ^ key_0, (product_0 >> 32 & low) ^ d ^ key_1
        b, d = product_1 & low, product_0 & low
        key_0, key_1 = (key_0 + 0x9E3779B9) & low, (key_1 + 0xBB67AE85) & low
    return torch.stack((a, b, c, d), dim=1).flatten()


def elected_sum(deltas: Tensor, weight: Sequence[float], elect: str, normalize: str) -> Tensor:
    """See `polymerge.methods.kernels.elected_sum`."""
    share = [_rounded(one, deltas) for one in weight]
    say = share if elect == "weighted" else [1.0] * len(share)
    part = share if normalize == "weight" else [1.0] * len(share)
    votes = [row * vote for row, vote in zip(deltas, say, strict=True)]
    ballot = votes[0].clone()
    for vote in votes[1:]:
        ballot += vote
    plus = ballot >= 0
    zero = torch.zeros_like(ballot)
    total, parts = zero.clone(), zero.clone()
    for row, vote, own, counts in zip(deltas, votes, share, part, strict=True):
        agrees = torch.where(plus, vote, -vote) > 0
        total += torch.where(agrees, row * own, zero)
        parts += torch.where(agrees, torch.full_like(zero, counts), zero)
    if normalize == "none":
        return total
    return total / torch.where(parts.abs() >= _rounded(1e-8, parts), parts, torch.ones_like(parts))
