"""How far a merge keeps the singular directions of an adapter, and their strengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polymerge.errors import RecipeError
from polymerge.methods.lora import Factors, check_shapes, decompose

__all__ = ["Agreement", "Directions", "directions"]


@dataclass(frozen=True)
class Agreement:
    """Means over some singular components of an adapter.

    cosine  |cos| of its singular vectors and those of the merge, over left and right ones, in [0, 1]
    ratio   singular value of the merge over its own
    count   how many components, at least 1
    """

    cosine: float
    ratio: float
    count: int


@dataclass(frozen=True)
class Directions:
    """What a merge keeps of an adapter: of its largest directions, of the rest (None: there are none).

    left_out  components of the adapter that are zero, in itself or in the merge, and so have no direction
    """

    largest: Agreement | None
    rest: Agreement | None
    left_out: int


def directions(merged: Factors, task: Factors, largest: int) -> Directions:
    """Compare the singular vectors and values of a merged update with those of one adapter.

    Zeng et al. 2025, arXiv:2502.17159, section 4.3 and figure 7, which do not say how vectors are matched: here the
    i-th of one and the i-th of the other by falling singular value, |cos| because signs are arbitrary, averaged over
    left and right. Where an adapter has equal singular values its single vectors are arbitrary, and so is their cosine.

    merged   factors of the merge, of any rank
    task     factors of the adapter, of the same update shape [out, in]
    largest  how many components count as the largest, at least 1; all further ones of the adapter are the rest
    returns  the means; components whose singular value is below 2^-23 of the largest, here or there, are left out
    raises   RecipeError where shapes differ or `largest` is below 1
    """
    if largest < 1:
        raise RecipeError(f"largest: {largest} is not at least 1")
    check_shapes([merged, task])
    ours, own = decompose(merged), decompose(task)
    shared = min(ours.determined, own.determined)
    left = np.abs((ours.u[:, :shared] * own.u[:, :shared]).sum(axis=0))
    right = np.abs((ours.v[:shared] * own.v[:shared]).sum(axis=1))
    cosines, ratios = np.minimum((left + right) / 2, 1.0), ours.s[:shared] / own.s[:shared]
    groups = [
        Agreement(float(cosines[part].mean()), float(ratios[part].mean()), len(cosines[part]))
        if len(cosines[part])
        else None
        for part in (slice(largest), slice(largest, None))
    ]
    return Directions(groups[0], groups[1], len(own.s) - shared)
