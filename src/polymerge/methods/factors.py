"""Low-rank updates as pairs of factors: added up, decomposed and cut to a rank without ever being multiplied out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from polymerge.errors import RecipeError
from polymerge.methods.weights import per_model

__all__ = ["Decomposition", "Factors", "Wide", "check_rank", "check_shapes", "decompose", "dot", "narrow", "of_dense"]
__all__ += ["pad", "signed", "stack", "truncate"]

Wide: TypeAlias = NDArray[np.float64]

EXACT = 512
"""Dense matrices whose smaller side is no longer than this are decomposed in full."""

ROUNDS, SPARE = 6, 10
BLOCK = 512  # rows that are widened to float64 at a time


class Factors(NamedTuple):
    """An update `b @ a` [out, in], every scaling folded in; float32, `b` [out, r], `a` [r, in]."""

    b: NDArray[np.float32]
    a: NDArray[np.float32]

    @property
    def rank(self) -> int:
        """How many columns `b` and rows `a` has, whether or not they are independent."""
        return len(self.a)


class Decomposition(NamedTuple):
    """A matrix as `u @ diag(s) @ v`: `u` [out, k], `s` [k] descending, `v` [k, in], in float64."""

    u: Wide
    s: Wide
    v: Wide

    @property
    def determined(self) -> int:
        """How many components are more than rounding of float32 factors: more than 2^-23 of the largest."""
        return int(np.count_nonzero(self.s > self.s[0] * 2.0**-23))

    def factors(self, rank: int) -> Factors:
        """The `rank` largest components, or zeros where there are fewer; the roots of `s` go to both sides."""
        roots = np.sqrt(self.s[:rank])
        return pad(Factors(narrow(self.u[:, :rank] * roots), narrow(roots[:, None] * self.v[:rank])), rank)


def narrow(x: NDArray[Any]) -> NDArray[np.float32]:
    """Round to float32, in memory row by row."""
    return np.ascontiguousarray(x, np.float32)


def check_shapes(pairs: Sequence[Factors]) -> None:
    """Raise RecipeError unless there is a pair, each fits together and all are updates of one shape."""
    if not pairs:
        raise RecipeError("adapters: there are none. Give at least one")
    for place, (b, a) in enumerate(pairs):
        if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0] or not a.shape[0]:
            raise RecipeError(f"adapter {place}: B is {list(b.shape)} and A is {list(a.shape)}; they are no product")
    shapes = [(b.shape[0], a.shape[1]) for b, a in pairs]
    for place, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise RecipeError(f"adapter {place}: the update is {list(shape)}, that of adapter 0 is {list(shapes[0])}")


def check_rank(rank: int) -> None:
    """Raise RecipeError for a rank below 1."""
    if rank < 1:
        raise RecipeError(f"rank: {rank} is not at least 1")


def signed(u: Wide, s: Wide, v: Wide) -> Decomposition:
    """Choose the signs of singular vectors: the largest entry of each column of `u`, first of equals, is positive."""
    places = np.abs(u).argmax(axis=0)
    signs = np.where(u[places, np.arange(len(places))] < 0, -1.0, 1.0)
    return Decomposition(u * signs, s, v * signs[:, None])


def dot(one: Factors, other: Factors) -> float:
    """The sum of products, entry by entry, of two updates of one shape, in float64; neither is multiplied out."""
    (b, a), (d, c) = ((x.astype(np.float64), y.astype(np.float64)) for x, y in (one, other))
    # <b a, d c> is the sum over the entries of (b' d) * (a c')
    return float(((b.T @ d) * (a @ c.T)).sum())


def decompose(factors: Factors) -> Decomposition:
    """Decompose an update into singular vectors and values, by QR of both factors and an SVD of what is between them.

    factors  `b` [out, r] and `a` [r, in], finite
    returns  min(out, r, in) components, float64; of each left vector the largest entry is positive
    """
    left, upper = np.linalg.qr(factors.b.astype(np.float64))
    right, lower = np.linalg.qr(factors.a.T.astype(np.float64))
    u, s, v = np.linalg.svd(upper @ lower.T, full_matrices=False)
    return signed(left @ u, s, v @ right.T)


def pad(factors: Factors, rank: int) -> Factors:
    """Append zeros until there are `rank` columns in `b` and rows in `a`; leave factors that have as many."""
    missing = rank - factors.rank
    if missing <= 0:
        return factors
    return Factors(np.pad(factors.b, ((0, 0), (0, missing))), np.pad(factors.a, ((0, missing), (0, 0))))


def stack(pairs: Sequence[Factors], weight: Sequence[float]) -> Factors:
    """Add updates up, each times its weight, as one update whose rank is the sum of their ranks.

    pairs    updates of one shape [out, in], of any ranks
    weight   [model]  of either sign
    returns  all `a` stacked, unchanged, and all `b` side by side, each times its weight, rounded once to float32
    raises   RecipeError where there are no pairs, shapes differ or `weight` is not one number per pair
    """
    check_shapes(pairs)
    weights = per_model(weight, len(pairs), "weight")
    scaled = [narrow(b * np.float64(number)) for (b, _), number in zip(pairs, weights, strict=True)]
    return Factors(np.concatenate(scaled, axis=1), np.concatenate([narrow(a) for _, a in pairs]))


def truncate(factors: Factors, rank: int) -> tuple[Factors, float]:
    """Approximate an update as well as a rank allows.

    Eckart and Young 1936, by `decompose`, so no matrix of the size [out, in] comes up. The singular values are split
    evenly: the roots go to both factors.

    factors  `b` [out, r] and `a` [r, in], finite
    rank     at least 1
    returns  factors of exactly that rank, and the error, the Frobenius norm of what is lost over that of the update, in
             [0, 1]. Where `rank` is r or more: the same factors, bit for bit, and 0
    raises   RecipeError where `rank` is below 1
    """
    check_rank(rank)
    check_shapes([factors])
    if rank >= factors.rank:
        return factors, 0.0
    parts = decompose(factors)
    return parts.factors(rank), _share(np.linalg.norm(parts.s[rank:]), np.linalg.norm(parts.s))


def _share(lost: np.floating[Any], whole: np.floating[Any]) -> float:
    return float(lost / whole) if whole > 0 else 0.0


def of_dense(matrix: NDArray[np.float32], rank: int) -> tuple[Factors, float]:
    """Approximate a dense matrix by factors as well as a rank allows.

    In full where the shorter side is at most 512 or the rank leaves nothing to save; else by subspace iteration from
    random signs (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1): 2 * rank + 10 directions,
    six rounds, always the same draws. What it loses is the least possible to many digits where singular values fall,
    and about a thousandth more for noise, whose singular values hardly do.

    matrix   [out, in], finite; never copied as a whole where the iteration is taken
    rank     at least 1
    returns  factors of exactly that rank, filled with zeros beyond what a matrix can have, and the error, the Frobenius
             norm of what is lost over that of the matrix, in [0, 1]
    raises   RecipeError where `rank` is below 1
    """
    check_rank(rank)
    wanted = 2 * rank + SPARE
    if min(matrix.shape) <= max(EXACT, 2 * wanted):
        parts = signed(*np.linalg.svd(matrix.astype(np.float64), full_matrices=False))
        return parts.factors(rank), _share(np.linalg.norm(parts.s[rank:]), np.linalg.norm(parts.s))
    parts = _sketched(matrix, wanted)
    weighted, kept = parts.u[:, :rank] * parts.s[:rank], parts.v[:rank]
    lost = whole = 0.0
    for at in _blocks(matrix):
        rows = matrix[at].astype(np.float64)
        whole += float(np.square(rows).sum())
        lost += float(np.square(rows - weighted[at] @ kept).sum())
    return parts.factors(rank), _share(np.sqrt(lost), np.sqrt(whole))


def _sketched(matrix: NDArray[np.float32], wanted: int) -> Decomposition:
    """About the `wanted` largest components; the matrix is widened to float64 a block of rows at a time."""
    columns = matrix.shape[1]
    draws = np.frombuffer(np.random.RandomState(0).bytes(columns * wanted // 8 + 1), np.uint8)  # a frozen stream
    right: NDArray[Any] = 2.0 * np.unpackbits(draws)[: columns * wanted].reshape(columns, wanted) - 1
    for _ in range(ROUNDS):
        left, _ = np.linalg.qr(_product(matrix, right))
        total: NDArray[Any] = np.zeros((columns, wanted))
        for at in _blocks(matrix):
            total += matrix[at].T.astype(np.float64) @ left[at]
        right, _ = np.linalg.qr(total)
    left, upper = np.linalg.qr(_product(matrix, right))
    u, s, v = np.linalg.svd(upper)
    return signed(left @ u, s, v @ right.T)


def _product(matrix: NDArray[np.float32], right: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([matrix[at].astype(np.float64) @ right for at in _blocks(matrix)])


def _blocks(matrix: NDArray[np.float32]) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, len(matrix), BLOCK)]
