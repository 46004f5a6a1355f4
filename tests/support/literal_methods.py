"""The merge methods once more, from the papers' formulas: whole tensors in memory, sorting, no thought of speed.

Every function takes float arrays that are flat, [model][n], and rounds where the formula has an operation.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def weighted(rows: Sequence[Array], weight: Sequence[float], normalize: bool) -> Array:
    if normalize:
        total = math.fsum(weight)
        weight = [one / total for one in weight]
    kind = rows[0].dtype.type
    result = kind(weight[0]) * rows[0]
    for one, row in zip(weight[1:], rows[1:], strict=True):
        result = result + kind(one) * row
    return result


def largest(delta: Array, density: float) -> Array:
    """What is as large as the `int(density * n)`-th largest magnitude, or as the largest; zero elsewhere."""
    if density == 0:
        return np.zeros_like(delta)
    falling = sorted(abs(float(value)) for value in delta)[::-1]
    reach = falling[max(int(density * delta.size), 1) - 1]
    return np.array([value if abs(value) >= reach else 0 for value in delta], delta.dtype)


def elected(deltas: Sequence[Array], weight: Sequence[float], elect: str, normalize: str) -> Array:
    """Element by element: the sign of the sum, then what agrees with it."""
    kind = deltas[0].dtype.type
    result = np.zeros_like(deltas[0])
    say = [kind(one) for one in weight]
    for place in range(result.size):
        own = [delta[place] for delta in deltas]
        votes = [s * value for s, value in zip(say, own, strict=True)] if elect == "weighted" else own
        total = votes[0]
        for vote in votes[1:]:
            total = total + vote
        agree = [vote > 0 if total >= 0 else vote < 0 for vote in votes]
        merged, share = kind(0), kind(0)
        for one, value, agrees in zip(say, own, agree, strict=True):
            if agrees:
                merged = merged + one * value
                share = share + (one if normalize == "weight" else kind(1))
        divides = normalize != "none" and abs(share) >= 1e-8
        result[place] = merged / share if divides else merged
    return result


def drawn(delta: Array, density: float, rescale: bool, seed: int, model: int, name: str) -> Array:
    """Keep each entry with the chance `density`, by a word of its own of Philox4x32-10."""
    if density >= 1:
        return delta
    digest = hashlib.sha256(f"{seed}\0{model}\0{name}".encode()).digest()
    words = philox(int.from_bytes(digest[:8], "little"), delta.size)
    kind = delta.dtype.type
    factor = kind(1 / density if rescale and density > 0 else 1)
    return np.where(words < math.floor(density * 2**32), delta * factor, kind(0))


def drawn_by_rank(
    delta: Array, width: int, density: float, epsilon: float, rescale: bool, seed: int, model: int, name: str
) -> Array:
    """Keep each entry with the chance of its rank in its row, then scale to the L1 norm of all."""
    if density in (0, 1):
        return delta * delta.dtype.type(density)
    digest = hashlib.sha256(f"{seed}\0{model}\0{name}".encode()).digest()
    words = philox(int.from_bytes(digest[:8], "little"), delta.size)
    kept = np.zeros_like(delta)
    for place, value in enumerate(delta):
        row = [abs(float(one)) for one in delta[place // width * width :][:width]]
        smaller, equal = (sum(one < abs(value) for one in row), sum(one == abs(value) for one in row))
        rank = smaller + (equal - 1) / 2
        chance = density - epsilon + 2 * epsilon * rank / (width - 1) if width > 1 else density
        if int(words[place]) < chance * 2**32:
            kept[place] = value
    whole, left = (math.fsum(abs(float(one)) for one in row) for row in (delta, kept))
    return kept * delta.dtype.type(whole / left if rescale and min(whole, left) >= 1e-7 else 1)


def most_important(delta: Array, base: Array, width: int) -> Array:
    """What is far above the quartiles of |delta| times the divergence of its row; zero elsewhere."""
    scores = []
    for start in range(0, delta.size, width):
        rows = []
        for row in (base.astype(np.float64) + delta, base.astype(np.float64)):
            powers = [math.exp(one - max(row[start : start + width])) for one in row[start : start + width]]
            rows.append([one / math.fsum(powers) + 1e-8 for one in powers])
        divergence = max(math.fsum(p * math.log(p / q) for p, q in zip(*rows, strict=True)), 0.0)
        scores += [abs(one) * delta.dtype.type(divergence) for one in delta[start : start + width]]
    first, median, third = (float(sorted(scores)[int(share * (delta.size - 1))]) for share in (0.25, 0.5, 0.75))
    least = delta.dtype.type(median + 1.5 * (third - first))
    return np.array([one if score >= least else 0 for one, score in zip(delta, scores, strict=True)], delta.dtype)


def philox(key: int, count: int) -> Array:
    """The first words under a key: Salmon et al. 2011, table 2 and section 3.3."""
    low = np.uint64(0xFFFFFFFF)
    place = np.arange(-(-count // 4), dtype=np.uint64)
    counter = [place & low, place >> np.uint64(32), np.zeros_like(place), np.zeros_like(place)]
    keys = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        first, third = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        counter = [
            (third >> np.uint64(32)) ^ counter[1] ^ np.uint64(keys[0]),
            third & low,
            (first >> np.uint64(32)) ^ counter[3] ^ np.uint64(keys[1]),
            first & low,
        ]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(counter, axis=1).reshape(-1)[:count]


def on_the_arc(rows: Sequence[Array], t: float) -> Array:
    def dot(one: Array, other: Array) -> float:
        return math.fsum(float(a) * float(b) for a, b in zip(one, other, strict=True))

    cosine = dot(*rows) / (math.sqrt(dot(rows[0], rows[0])) * math.sqrt(dot(rows[1], rows[1])))
    if abs(cosine) > 0.9995:
        return weighted(rows, [1 - t, t], normalize=False)
    angle = math.acos(cosine)
    return weighted(rows, [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)], False)
