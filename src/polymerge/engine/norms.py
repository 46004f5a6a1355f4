"""Norms of updates: the merged one relative to the adapters', similarity of A factors, and zero updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import fsum, sqrt
from typing import Any, Final, NamedTuple

import numpy as np

from polymerge.checkpoints import TensorInfo
from polymerge.checkpoints.adapter import Adapter
from polymerge.checkpoints.pairs import Pair as Factored
from polymerge.engine.extents import Files
from polymerge.methods.lora import Factors, dot
from polymerge.methods.table import METHODS
from polymerge.recipe.parameters import Setting

__all__ = ["ModuleNorms", "UpdateNorms", "module_norms", "together", "update_norms", "zero_update"]

LARGE: Final = 1.5
"""Ratio of the merged update's norm to its adapters' that triggers a warning."""

ALIKE: Final = 0.5
"""Cosine of A factors below which one adapter's B does not match another's A."""

Pair = tuple[str, str]


class ModuleNorms(NamedTuple):
    """Measurements of one merged module.

    setting   the index of the plan's setting that merged it
    merged    squared Frobenius norm of the merged update; `adapters` the mean of those of the adapters' updates
    cosines   of the A factors of every two adapters, as vectors; none if ranks differ or one is zero
    lost      norm lost by truncation to the output's rank, relative to the full norm
    """

    module: str
    setting: int
    merged: float
    adapters: float
    cosines: Mapping[Pair, float]
    lost: float

    @property
    def ratio(self) -> float | None:
        """See `UpdateNorms`."""
        return sqrt(self.merged / self.adapters) if self.adapters else None


@dataclass(frozen=True)
class UpdateNorms:
    """Norms of the merged update relative to those of its adapters.

    ratio     Frobenius norm of the merged update over the root mean square of the adapters', all merged modules
              together; None if the adapters' are zero
    modules   the same for each module
    cosines   for each two adapters, the cosine of their A factors, row by row, averaged over the modules: near 1
              if both started from the same A, else near 0
    lost      for each module, the share of its norm lost by truncation to the output's rank
    warnings  warnings about these numbers
    """

    ratio: float | None
    modules: Mapping[str, float]
    cosines: Mapping[Pair, float]
    lost: Mapping[str, float]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        cosines = [{"adapters": list(pair), "cosine": cosine} for pair, cosine in self.cosines.items()]
        return {"ratio": self.ratio, "modules": dict(self.modules), "a_cosines": cosines}


def module_norms(
    module: str,
    setting: int,
    labels: Sequence[str],
    pairs: Sequence[Factors],
    merged: Factors,
    scaling: float,
    lost: float,
) -> ModuleNorms:
    """Measure one module, in float64 and from the factors alone.

    labels   [model] the adapters' labels
    pairs    [model] their updates; like `merged`, without the common factor `scaling`
    """
    powers = [scaling**2 * max(dot(one, one), 0.0) for one in (*pairs, merged)]
    wide = [pair.a.astype(np.float64) for pair in pairs]
    lengths = [float(np.linalg.norm(a)) for a in wide]
    cosines = {
        (labels[i], labels[j]): float((wide[i] * wide[j]).sum() / (lengths[i] * lengths[j]))
        for i, j in combinations(range(len(pairs)), 2)
        if wide[i].shape == wide[j].shape and lengths[i] and lengths[j]
    }
    return ModuleNorms(module, setting, powers[-1], fsum(powers[:-1]) / len(pairs), cosines, lost)


def together(experts: Sequence[ModuleNorms]) -> ModuleNorms:
    """The measurements of all experts of one parameter as those of one module; of `lost`, the largest."""
    first, *more = experts
    if not more:
        return first
    sums = fsum(one.merged for one in experts), fsum(one.adapters for one in experts)
    return ModuleNorms(first.module, first.setting, *sums, _cosines(experts), max(one.lost for one in experts))


def update_norms(measured: Sequence[ModuleNorms], settings: Sequence[Setting]) -> UpdateNorms:
    """Aggregate the measurements of a merge's modules; `settings` are the plan's."""
    modules = {one.module: ratio for one in measured if (ratio := one.ratio) is not None}
    warnings = []
    for place, setting in enumerate(settings):
        own = [one for one in measured if one.setting == place]
        ratio, cosines = _ratio(own), _cosines(own)
        if ratio is not None and ratio > LARGE:
            warnings.append(_too_large(setting, ratio, max(own, key=lambda one: one.ratio or 0.0)))
        least = min(cosines, key=lambda pair: cosines[pair], default=None)
        if setting.joins_factors and least is not None and cosines[least] < ALIKE:
            warnings.append(_unlike(setting, least, cosines[least]))
    lost = {one.module: one.lost for one in measured}
    return UpdateNorms(_ratio(measured), modules, _cosines(measured), lost, tuple(warnings))


def _ratio(measured: Sequence[ModuleNorms]) -> float | None:
    adapters = fsum(one.adapters for one in measured)
    return sqrt(fsum(one.merged for one in measured) / adapters) if adapters else None


def _cosines(measured: Sequence[ModuleNorms]) -> dict[Pair, float]:
    found: dict[Pair, list[float]] = {}
    for one in measured:
        for pair, cosine in one.cosines.items():
            found.setdefault(pair, []).append(cosine)
    return {pair: fsum(some) / len(some) for pair, some in found.items()}


def _too_large(setting: Setting, ratio: float, worst: ModuleNorms) -> str:
    if METHODS[setting.method].parameter("scale"):
        scale = float(setting.parameters.get("scale", 1.0)) / ratio ** (0.5 if setting.joins_factors else 1.0)
        way_out = f"`scale: {scale:.2g}` makes it about as large as theirs"
    else:
        way_out = f"{setting.method} has no `scale`: task_arithmetic has one"
    return (
        f"{setting.method}: the norm of the merged update is {ratio:.2f} times the root mean square of the adapters', "
        f"{worst.ratio:.2f} times in {worst.module}. Above {LARGE} the merges of docs/adapters.md lose much of what "
        f"adapters and model can do; {way_out}"
    )


def _unlike(setting: Setting, pair: Pair, cosine: float) -> str:
    product = "compose" in setting.parameters
    said = "compose: factors" if product else "space: factors"
    return (
        f"{setting.method}, {said}: joins each adapter's B with every other one's A, which fits only where they began "
        f"with the same A; those of '{pair[0]}' and '{pair[1]}' have a cosine of {cosine:.2f}, below {ALIKE}. "
        f"Set {'compose: product' if product else 'space: delta'}"
    )


def zero_update(label: str, adapter: Adapter) -> str | None:
    """A sentence on an adapter whose update is all zeros, as if untrained or not gathered; None otherwise.

    Reads values up to the first that is not zero.
    """
    files = Files()
    try:
        if not adapter.pairs or not all(_is_zero(pair, files) for pair in adapter.pairs.values()):
            return None
    finally:
        files.close()
    full = len(adapter.non_lora) + len(adapter.tokens)
    rest = f"only its {full} full weights come" if full else "nothing of it comes"
    return (
        f"'{label}': the update of its {len(adapter.pairs)} modules is all zeros, so that {rest} into the output. If "
        "it was trained, its lora_B were not saved as they were then"
    )


def _is_zero(pair: Factored, files: Files) -> bool:
    """Return whether a pair's update is zero: one of its factors is, and so is its bias."""
    return any(_all_zero(one, files) for one in (pair.b, pair.a)) and (not pair.bias or _all_zero(pair.bias, files))


def _all_zero(entry: TensorInfo, files: Files) -> bool:
    _, values, finite = files.numbers(entry)
    return finite and not values.any()
