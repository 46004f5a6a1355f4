"""How well a merged adapter preserves the singular directions and strengths of each of its source adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from polymerge.analysis.deltas import stored_values
from polymerge.checkpoints.adapter import Adapter, open_adapter
from polymerge.checkpoints.hub import locate
from polymerge.checkpoints.pairs import Pair
from polymerge.engine.lora_modules import factors_of
from polymerge.errors import RecipeError
from polymerge.families.expressions import LowRank
from polymerge.methods.decompositions import one_thread
from polymerge.methods.lora import Factors, check_shapes, decompose
from polymerge.planning.inputs import labels_of

__all__ = ["Agreement", "Directions", "Robustness", "directions", "robustness"]


@dataclass(frozen=True)
class Agreement:
    """Means over singular components of an adapter.

    cosine  |cos| of its singular vectors and those of the merge, over left and right ones, in [0, 1]
    ratio   the merge's singular value divided by the adapter's
    count   number of components, at least 1
    """

    cosine: float
    ratio: float
    count: int


@dataclass(frozen=True)
class Directions:
    """The preservation of an adapter in a merge: of its largest directions, and of the rest (None if there are none).

    left_out  number of components that are zero, in the adapter or in the merge, and so have no direction
    """

    largest: Agreement | None
    rest: Agreement | None
    left_out: int


def directions(merged: Factors, task: Factors, largest: int) -> Directions:
    """Compare the singular vectors and values of a merged update with those of one adapter.

    Zeng et al. 2025, arXiv:2502.17159, section 4.3 and figure 7, which do not say how vectors are matched: here the
    i-th of one and the i-th of the other by falling singular value, |cos| because signs are arbitrary, averaged over
    left and right. Singular vectors of equal singular values are arbitrary, and so is their cosine.

    merged   factors of the merge, of any rank
    task     factors of the adapter, of the same update shape [out, in]
    largest  number of components that count as the largest, at least 1; all others of the adapter are the rest
    returns  the means; components whose singular value is below 2^-23 of the largest, here or there, are left out
    raises   RecipeError if shapes differ or `largest` is below 1
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


@dataclass(frozen=True)
class Robustness:
    """A merged adapter compared with one of its source adapters.

    modules        the comparison for each module that both have
    largest, rest  means over all components of all modules, of the largest ones of each module and of the others
    left_out       number of components that are zero in either, and so have no direction
    absent         modules of the adapter that the merge lacks
    """

    adapter: str
    modules: Mapping[str, Directions]
    largest: Agreement | None
    rest: Agreement | None
    left_out: int
    absent: tuple[str, ...]


def robustness(merged: str, against: Sequence[str], largest: int | None = None) -> list[Robustness]:
    """Compare a merged adapter with each of its source adapters, by the singular vectors of their updates.

    Zeng et al. 2025, arXiv:2502.17159, section 4.3 and figure 7 (see `directions` for what they leave open). Computed
    from the factors alone, in float64; BLAS uses one thread, so that results do not depend on the number of cores.

    largest   number of components per module that count as the largest; by default a quarter of the adapter's rank

    raises RecipeError or CheckpointError for a source that is not an adapter, or shares no module with the merge.
    """
    ours = open_adapter(merged, locate(merged))
    labels = labels_of(against)
    found = []
    with one_thread():
        for source in against:
            theirs = open_adapter(source, locate(source))
            shared = [module for module in theirs.pairs if module in ours.pairs]
            if not shared:
                raise RecipeError(
                    f"'{labels[source]}' and '{merged}' have no module in common: they are of different models"
                )
            modules = {
                f"{module}{f'[{expert}]' if theirs.pairs[module].experts else ''}": compared
                for module in shared
                for expert, compared in enumerate(_compare(ours, theirs, module, largest))
            }
            found.append(
                Robustness(
                    labels[source],
                    modules,
                    _mean([one.largest for one in modules.values()]),
                    _mean([one.rest for one in modules.values()]),
                    sum(one.left_out for one in modules.values()),
                    tuple(module for module in theirs.pairs if module not in ours.pairs),
                )
            )
    return found


def _compare(ours: Adapter, theirs: Adapter, module: str, largest: int | None) -> list[Directions]:
    """Compare one module, or each expert of a parameter."""
    pair, own = theirs.pairs[module], ours.pairs[module]
    if (pair.shape, pair.kernel, pair.experts) != (own.shape, own.kernel, own.experts):
        raise RecipeError(
            f"{module}: '{theirs.source}' is {list(pair.shape)}, '{ours.source}' is {list(ours.pairs[module].shape)}. "
            "They are of different models"
        )
    each = zip(_factors(own), _factors(pair), strict=True)
    return [directions(one, other, largest or max(pair.rank // 4, 1)) for one, other in each]


def _factors(pair: Pair) -> list[Factors]:
    read = LowRank(pair.a.name, pair.b.name, pair.scaling, experts=pair.experts)
    a, b = (stored_values(one).reshape(one.shape[0], -1) for one in (pair.a, pair.b))
    return factors_of(read, b * np.float32(pair.scaling), a)


def _mean(groups: Sequence[Agreement | None]) -> Agreement | None:
    there = [group for group in groups if group is not None]
    count = sum(group.count for group in there)
    if not count:
        return None
    cosine = sum(group.cosine * group.count for group in there) / count
    return Agreement(cosine, sum(group.ratio * group.count for group in there) / count, count)
