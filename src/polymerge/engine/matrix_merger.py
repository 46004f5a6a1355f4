"""Merge a whole matrix: its deltas are read block by block, merged by one call, and written block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from polymerge.engine.blocks import PieceBlocks
from polymerge.errors import CheckpointError
from polymerge.methods import kernels
from polymerge.methods.method import method_function
from polymerge.methods.table import SHARED
from polymerge.planning.matrix_costs import Matrices
from polymerge.recipe.parameters import Setting

__all__ = ["merge_matrix"]


def merge_matrix(
    setting: Setting,
    number: int,
    matrices: Matrices,
    blocks: PieceBlocks,
    base: PieceBlocks,
    put: Callable[[int, Any], None],
    size: int,
) -> None:
    """Merge one matrix of a piece, on one thread.

    number  which of the piece's matrices
    blocks  the models' elements, less the base's
    base    the base's elements, which are read again once the deltas are merged: so they take no memory until then
    put     writes merged elements, from a position on
    size    elements to read and write at a time

    raises CheckpointError if an input is not finite, or the matrix cannot be decomposed.
    """
    row, count = setting.row, matrices.rows * matrices.columns
    start, stop = number * count, (number + 1) * count
    deltas = blocks.empty(matrices.models, count)
    for first in range(start, stop, size):
        last = min(first + size, stop)
        deltas[:, first - start : last - start] = blocks.read_at(first, last - first).models
    deltas = deltas.reshape(matrices.models, matrices.rows, matrices.columns)
    found = _merged(setting, deltas if row.takes_tensors else kernels.on_host(deltas), blocks.name)
    merged = blocks.numbers(found).reshape(-1)
    scale = float(setting.parameters.get("scale", 1.0))
    for first in range(start, stop, size):
        last = min(first + size, stop)
        (origin,) = base.read_at(first, last - first).models
        put(first, kernels.add_scaled(origin, merged[first - start : last - start], scale))


def _merged(setting: Setting, deltas: Any, name: str) -> Any:
    """Call the method's function on deltas [model, m, n], and check the shape of what it returns."""
    row, shape = setting.row, deltas.shape[1:]
    given = {name: value for name, value in setting.parameters.items() if row.parameter(name) and name not in SHARED}
    try:
        merged = method_function(row)(deltas, **given)
    except (np.linalg.LinAlgError, RuntimeError) as error:  # the second is what torch's errors have in common
        if not isinstance(error, np.linalg.LinAlgError) and type(error).__name__ != "_LinAlgError":
            raise
        raise CheckpointError(
            f"{name}: {row.name} cannot decompose this matrix: {error}. Name it in exclude, or give it another method"
        ) from error
    if tuple(merged.shape) != tuple(shape):
        raise ValueError(f"{row.name}: its function returned {list(merged.shape)} for deltas of {list(shape)}")
    return merged
