"""Low-rank updates as pairs of factors: summed, decomposed, truncated and mapped to common spaces.

Updates are never multiplied out, except in `of_dense`, whose argument is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from polymerge.errors import RecipeError
from polymerge.methods.weights import per_model

__all__ = [
    "EXACT",
    "Cores",
    "Decomposition",
    "Factors",
    "Space",
    "SpaceName",
    "Wide",
    "check_rank",
    "check_shapes",
    "cores_of",
    "decompose",
    "dot",
    "enter",
    "narrow",
    "of_dense",
    "pad",
    "signed",
    "sketched",
    "stack",
    "truncate",
]

Wide: TypeAlias = NDArray[np.float64]

EXACT = 512
"""Dense matrices whose smaller side does not exceed this are decomposed in full."""

ROUNDS, SPARE = 6, 10
BLOCK = 512  # rows that are widened to float64 at a time


class Factors(NamedTuple):
    """An update `b @ a` [out, in], with scalings included; float32, `b` [out, r], `a` [r, in]."""

    b: NDArray[np.float32]
    a: NDArray[np.float32]

    @property
    def rank(self) -> int:
        """The number of columns of `b` and rows of `a`, independent or not."""
        return len(self.a)


class Decomposition(NamedTuple):
    """A matrix as `u @ diag(s) @ v`: `u` [out, k], `s` [k] descending, `v` [k, in], in float64."""

    u: Wide
    s: Wide
    v: Wide

    @property
    def determined(self) -> int:
        """The number of components above the rounding of float32 factors: more than 2^-23 of the largest."""
        return int(np.count_nonzero(self.s > self.s[0] * 2.0**-23))

    def factors(self, rank: int) -> Factors:
        """The `rank` largest components, or zeros if there are fewer; both sides get the roots of `s`."""
        roots = np.sqrt(self.s[:rank])
        return pad(Factors(narrow(self.u[:, :rank] * roots), narrow(roots[:, None] * self.v[:rank])), rank)


def narrow(x: NDArray[Any]) -> NDArray[np.float32]:
    """Round to float32, contiguous in memory."""
    return np.ascontiguousarray(x, np.float32)


def check_shapes(pairs: Sequence[Factors]) -> None:
    """Raise RecipeError unless there is at least one pair, each is consistent, and all updates have the same shape."""
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
    """The Frobenius inner product of two updates of the same shape, in float64, from the factors alone."""
    (b, a), (d, c) = ((x.astype(np.float64), y.astype(np.float64)) for x, y in (one, other))
    # <b a, d c> is the sum over the entries of (b' d) * (a c')
    return float(((b.T @ d) * (a @ c.T)).sum())


def decompose(factors: Factors) -> Decomposition:
    """Decompose an update into singular vectors and values, by QR of both factors and an SVD of the core.

    factors  `b` [out, r] and `a` [r, in], finite
    returns  min(out, r, in) components, float64; of each left vector the largest entry is positive
    """
    left, upper = np.linalg.qr(factors.b.astype(np.float64))
    right, lower = np.linalg.qr(factors.a.T.astype(np.float64))
    u, s, v = np.linalg.svd(upper @ lower.T, full_matrices=False)
    return signed(left @ u, s, v @ right.T)


def pad(factors: Factors, rank: int) -> Factors:
    """Pad `b` and `a` with zeros to `rank` columns and rows; factors of that rank are returned unchanged."""
    missing = rank - factors.rank
    if missing <= 0:
        return factors
    return Factors(np.pad(factors.b, ((0, 0), (0, missing))), np.pad(factors.a, ((0, missing), (0, 0))))


def stack(pairs: Sequence[Factors], weight: Sequence[float]) -> Factors:
    """Sum weighted updates as one update whose rank is the sum of their ranks.

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
    """Approximate an update optimally at a given rank.

    Eckart and Young 1936, by `decompose`, so no [out, in] matrix is formed. The singular values are split
    evenly: the roots go to both factors.

    factors  `b` [out, r] and `a` [r, in], finite
    rank     at least 1
    returns  factors of exactly that rank, and the relative error in the Frobenius norm, in
             [0, 1]. If `rank` is r or more: the same factors, bit for bit, and 0
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
    """Approximate a dense matrix by factors of a given rank.

    By a full SVD if the shorter side is at most 512 or the rank is too high to save work; else by subspace iteration on
    random signs (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1): 2 * rank + 10 directions,
    six iterations, deterministic draws. The error is optimal to many digits if the singular values decay,
    and about a thousandth larger for noise, whose singular values hardly do.

    matrix   [out, in], finite; never copied in full if the iteration is used
    rank     at least 1
    returns  factors of exactly that rank, padded with zeros beyond the matrix's rank, and the relative error in the
             Frobenius norm, in [0, 1]
    raises   RecipeError where `rank` is below 1
    """
    check_rank(rank)
    wanted = 2 * rank + SPARE
    if min(matrix.shape) <= max(EXACT, 2 * wanted):
        parts = signed(*np.linalg.svd(matrix.astype(np.float64), full_matrices=False))
        return parts.factors(rank), _share(np.linalg.norm(parts.s[rank:]), np.linalg.norm(parts.s))
    parts = sketched(matrix, wanted)
    weighted, kept = parts.u[:, :rank] * parts.s[:rank], parts.v[:rank]
    lost = whole = 0.0
    for at in _blocks(matrix):
        rows = matrix[at].astype(np.float64)
        whole += float(np.square(rows).sum())
        lost += float(np.square(rows - weighted[at] @ kept).sum())
    return parts.factors(rank), _share(np.sqrt(lost), np.sqrt(whole))


def sketched(matrix: NDArray[np.float32], wanted: int) -> Decomposition:
    """Approximate the `wanted` largest components; the matrix is converted to float64 a block of rows at a time."""
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


SpaceName = Literal["factors", "knots", "core"]


@dataclass(frozen=True)
class Space:
    """Adapters as coordinates in a common space.

    coordinates  one or two stacks [model, *shape], float32; each is merged separately, over its first axis
    left, right  factors that map merged coordinates back; None for the identity
    """

    coordinates: tuple[NDArray[np.float32], ...]
    left: Wide | None = None
    right: Wide | None = None

    def leave(self, merged: Sequence[NDArray[Any]]) -> Factors:
        """Map merged coordinates back to an adapter.

        merged   one array for each stack of `coordinates`, [*shape] or flat
        returns  factors, float32
        raises   RecipeError where their number or sizes are not those of `coordinates`
        """
        shapes = [stack.shape[1:] for stack in self.coordinates]
        if [np.size(x) for x in merged] != [int(np.prod(shape)) for shape in shapes]:
            raise RecipeError(f"merged: {[list(x.shape) for x in merged]} for coordinates of {[*map(list, shapes)]}")
        arrays = [np.reshape(x, shape) for x, shape in zip(merged, shapes, strict=True)]
        if self.left is None:
            a, b = arrays
            return Factors(narrow(b), narrow(a))
        if self.right is None:
            return Factors(narrow(self.left), narrow(arrays[0]))
        return Factors(narrow(self.left @ arrays[0].astype(np.float64)), narrow(self.right))


def enter(space: SpaceName, pairs: Sequence[Factors]) -> Space:
    """Map adapters to coordinates that can be merged entry by entry.

    factors  A and B apart, as the baselines of RobustMerge have it (Zeng et al. 2025, arXiv:2502.17159, appendix D).
             Not lossless: the product of sums has the cross terms of all adapters. Needs equal ranks
    knots    KnOTS (Stoica et al. 2025, arXiv:2410.19735, ICLR 2025): the updates side by side are
             U diag(s) [V_1 .. V_T]; the coordinates are V_t [k, in], mapped back as (U diag(s)) V. The paper takes the
             SVD of the [out, T * in] matrix, here it comes from QR of the stacked B, LQ of each A and an SVD of what
             is between them
    core     Core Space (Panariello et al. 2025, arXiv:2509.17786, NeurIPS 2025): U [out, k] are the left singular
             vectors of all B side by side, V^T [k', in] the right ones of all A stacked; the coordinates are
             U^T B_t A_t V [k, k'], mapped back as (U M) V^T

    In "knots" and "core" a sum of the coordinates, each times a weight, is that of the updates, up to the rounding of
    float32. Directions that no adapter has (singular values below float64 resolution) are dropped; one is kept if
    all adapters are zero. Of each left vector, and in "core" also of each right one, the largest entry is positive.

    pairs    [model]  updates of one shape [out, in], finite
    returns  the coordinates and the map back
    raises   RecipeError where there are no pairs, shapes differ, ranks differ (in "factors") or `space` is another word
    """
    if space not in get_args(SpaceName):
        raise RecipeError(f"space: '{space}' is not one of {', '.join(get_args(SpaceName))}")
    check_shapes(pairs)
    if space == "factors":
        ranks = [pair.rank for pair in pairs]
        if len(set(ranks)) > 1:
            raise RecipeError(
                f"space: the adapters have ranks {ranks}, so their factors do not match. Set space: delta"
            )
        return Space((narrow(np.stack([pair.a for pair in pairs])), narrow(np.stack([pair.b for pair in pairs]))))
    b, a = [pair.b.astype(np.float64) for pair in pairs], [pair.a.astype(np.float64) for pair in pairs]
    return _knots(b, a) if space == "knots" else _core(b, a)


def _directions(x: Wide) -> Decomposition:
    """The SVD of `x` without numerically zero components, but with at least one; signs are set by the left vectors."""
    q, r = np.linalg.qr(x)
    u, s, v = np.linalg.svd(r, full_matrices=False)
    count = max(1, int(np.count_nonzero(s > s[0] * max(x.shape) * np.finfo(np.float64).eps)))
    return signed(q @ u[:, :count], s[:count], v[:count])


def _knots(b: Sequence[Wide], a: Sequence[Wide]) -> Space:
    bases, lowers = zip(*((q, r.T) for q, r in (np.linalg.qr(x.T) for x in a)), strict=True)
    left, upper = np.linalg.qr(np.concatenate(b, axis=1))
    ends = np.cumsum([len(lower) for lower in lowers])[:-1]
    core = [block @ lower for block, lower in zip(np.split(upper, ends, axis=1), lowers, strict=True)]
    u, s, v = _directions(np.concatenate(core, axis=1))
    u, s, v = signed(left @ u, s, v)
    places = np.split(v, np.cumsum([lower.shape[1] for lower in lowers])[:-1], axis=1)
    stack = [narrow(part @ basis.T) for part, basis in zip(places, bases, strict=True)]
    return Space((np.stack(stack),), u * s)


def _core(b: Sequence[Wide], a: Sequence[Wide]) -> Space:
    cores = _cores(b, a)
    return Space((narrow(cores.deltas),), cores.left, cores.right)


class Cores(NamedTuple):
    """Updates as small matrices between two bases, whose columns and rows are orthonormal, all in float64.

    What is computed from singular values and vectors of the updates is the same between the bases as it is outside.

    deltas  [model, k, k']
    left    [out, k]
    right   [k', in]
    """

    deltas: Wide
    left: Wide
    right: Wide

    def leave(self, merged: Wide) -> Factors:
        """A merged core [k, k'] as an update, in float32."""
        return Factors(narrow(self.left @ merged), narrow(self.right))


def cores_of(pairs: Sequence[Factors]) -> Cores:
    """The updates as "core" of `enter` has them, in float64.

    pairs    [model]  updates of one shape [out, in], finite
    raises   RecipeError where there are no pairs, or shapes differ
    """
    check_shapes(pairs)
    return _cores([pair.b.astype(np.float64) for pair in pairs], [pair.a.astype(np.float64) for pair in pairs])


def _cores(b: Sequence[Wide], a: Sequence[Wide]) -> Cores:
    left = _directions(np.concatenate(b, axis=1)).u
    right = _directions(np.concatenate(a).T).u
    deltas = np.stack([(left.T @ x) @ (y @ right) for x, y in zip(b, a, strict=True)])
    return Cores(deltas, left, np.ascontiguousarray(right.T))
