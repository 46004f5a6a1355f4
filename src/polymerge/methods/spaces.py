"""Spaces in which any method that works entry by entry merges adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from polymerge.errors import RecipeError
from polymerge.methods.factors import Decomposition, Factors, Wide, check_shapes, narrow, signed

__all__ = ["Space", "SpaceName", "enter"]

SpaceName = Literal["factors", "knots", "core"]


@dataclass(frozen=True)
class Space:
    """Adapters as coordinates in a common space.

    coordinates  one or two stacks [model, *shape], float32; each is merged by itself, over its first axis
    left, right  what the merged coordinates are multiplied with on the way out; None for nothing
    """

    coordinates: tuple[NDArray[np.float32], ...]
    left: Wide | None = None
    right: Wide | None = None

    def leave(self, merged: Sequence[NDArray[Any]]) -> Factors:
        """Make an adapter of merged coordinates.

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
    """Write adapters as coordinates that can be merged entry by entry.

    factors  A and B apart, as the baselines of RobustMerge have it (Zeng et al. 2025, arXiv:2502.17159, appendix D).
             Not lossless: the product of sums has the cross terms of all adapters. Needs equal ranks
    knots    KnOTS (Stoica et al. 2025, arXiv:2410.19735, ICLR 2025): the updates side by side are
             U diag(s) [V_1 .. V_T]; the coordinates are V_t [k, in], the way out is (U diag(s)) V. The paper takes the
             SVD of the [out, T * in] matrix, here it comes from QR of the stacked B, LQ of each A and an SVD of what
             is between them
    core     Core Space (Panariello et al. 2025, arXiv:2509.17786, NeurIPS 2025): U [out, k] are the left singular
             vectors of all B side by side, V^T [k', in] the right ones of all A stacked; the coordinates are
             U^T B_t A_t V [k, k'], the way out is (U M) V^T

    In "knots" and "core" a sum of the coordinates, each times a weight, is that of the updates, up to the rounding of
    float32. Directions that no adapter has (singular values below what float64 resolves) are left out; one stays where
    all adapters are zero. Of each left vector, and in "core" also of each right one, the largest entry is positive.

    pairs    [model]  updates of one shape [out, in], finite
    returns  the coordinates and the way out
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
    """The SVD of `x` less what is numerically zero, but at least one component; signs as the left vectors want them."""
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
    left = _directions(np.concatenate(b, axis=1)).u
    right = _directions(np.concatenate(a).T).u
    cores = [narrow((left.T @ x) @ (y @ right)) for x, y in zip(b, a, strict=True)]
    return Space((np.stack(cores),), left, np.ascontiguousarray(right.T))
