"""Merge the factors of one module: in the space that the recipe asks for, and cut to the rank that was planned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polymerge.engine.statistics import exact_cutoffs
from polymerge.methods.factors import Factors, of_dense, pad, stack, truncate
from polymerge.methods.spaces import enter
from polymerge.methods.table import METHODS, SHARED, method_function
from polymerge.methods.ties import kept
from polymerge.methods.weights import shares
from polymerge.recipe.parameters import Setting

__all__ = ["merge_pairs", "model_weights"]

ROWS = 1 << 19
"""Elements of an update that are computed at a time where a method needs the update itself."""

Keys = Callable[[str], Sequence[int]]
"""Gives each model a key for its random draws on the tensor of this name."""


def merge_pairs(setting: Setting, pairs: Sequence[Factors], rank: int, keys: Keys) -> tuple[Factors, float]:
    """Merge updates that are given by their factors into one of rank `rank`.

    pairs    in the models' order, every scaling folded in
    keys     for methods that draw random numbers
    returns  the merged factors, and the norm of what the cut to `rank` left out, as a share of the whole's norm
    """
    row = METHODS[setting.method]
    given = {name: value for name, value in setting.parameters.items() if row.parameter(name) and name not in SHARED}
    scale = float(setting.parameters.get("scale", 1.0))
    function = method_function(row)
    if row.scales:
        given["scale"], scale = scale, 1.0
    if row.on == "factors":
        merged = function(pairs, **given, **({"rank": rank} if row.needs_rank else {}))
        return _cut(_scaled(merged, scale), rank)

    def join(rows: NDArray[Any], name: str, **more: Any) -> NDArray[Any]:
        drawn = {"keys": keys(name)} if row.random else {}
        result: NDArray[Any] = function(rows, **given, **drawn, **more)
        return result

    space = setting.parameters["space"]
    if space != "delta":
        inside = enter(space, pairs)
        joined = [
            join(stacked.reshape(len(pairs), -1).copy(), str(place)) * np.float32(scale)
            for place, stacked in enumerate(inside.coordinates)
        ]
        merged = inside.leave([one.reshape(of.shape[1:]) for one, of in zip(joined, inside.coordinates, strict=True)])
        return _cut(merged, rank)
    if row.additive:
        return _cut(_scaled(stack(pairs, model_weights(setting, len(pairs))), scale), rank)
    updates = _Updates(pairs)
    known: dict[str, Any] = {}
    if row.statistic == "cutoff":
        keep = kept(setting.parameters["density"], len(pairs), updates.count)
        known["cutoff"] = exact_cutoffs(updates, keep, lambda look, indices: map(look, indices))
    dense = np.empty((len(pairs[0].b), pairs[0].a.shape[1]), np.float32)
    for index, start in enumerate(range(0, len(dense), updates.rows)):
        at = {"start": start * dense.shape[1]} if row.random else {}
        block = join(updates.read(index), "", **known, **at).reshape(-1, dense.shape[1])
        np.multiply(block, np.float32(scale), out=dense[start : start + updates.rows])
    return of_dense(dense, rank)


def model_weights(setting: Setting, models: int) -> list[float]:
    """What each model counts in a plain sum: its weight, or an equal part where the method has no weights."""
    weight = setting.parameters.get("weight")
    if weight is None:
        return [1 / models] * models
    return shares(weight, models, setting.parameters.get("normalize") in (True, "weight", "count"))


def _cut(factors: Factors, rank: int) -> tuple[Factors, float]:
    """Factors of exactly this rank, with zeros where there is less to hold."""
    cut, error = truncate(factors, rank)
    return pad(cut, rank), error


def _scaled(factors: Factors, scale: float) -> Factors:
    return factors if scale == 1 else factors._replace(b=factors.b * np.float32(scale))


class _Updates:
    """The updates themselves, some rows of all models at a time, as a source of blocks that cutoffs are found in."""

    def __init__(self, pairs: Sequence[Factors]) -> None:
        self._pairs = pairs
        out, width = len(pairs[0].b), pairs[0].a.shape[1]
        self.rows = max(ROWS // width, 1)
        self.count = out * width
        self.sizes: Sequence[int] = [min(self.rows, out - start) * width for start in range(0, out, self.rows)]

    def read(self, index: int) -> NDArray[np.float32]:
        """The updates' rows of a block, [model, n]."""
        start = index * self.rows
        blocks: Iterable[NDArray[np.float32]] = (pair.b[start : start + self.rows] @ pair.a for pair in self._pairs)
        return np.stack([block.reshape(-1) for block in blocks])
