"""Whole matrices, for methods that need them: which tensors are some, and what decomposing them costs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

from polymerge.planning.model import VOCABULARY
from polymerge.planning.plan import Piece, Plan, Step

__all__ = ["Matrices", "decomposed", "is_matrix", "matrices_of", "room_for_matrices"]

_EXPERTS: Final = "experts"
"""What a tensor of three dimensions has in its name where it holds a matrix per expert, and no kernel."""

_COPIES: Final = 4
"""Matrices in memory beside those of the models: what the papers' steps have at once."""


@dataclass(frozen=True)
class Matrices:
    """The matrices of a piece: `count` of them, each [rows, columns], of `models` models; `size` bytes a number."""

    count: int
    rows: int
    columns: int
    models: int
    size: int

    @property
    def room(self) -> int:
        """Bytes of memory in which one of them is merged."""
        return (self.models + _COPIES) * self.rows * self.columns * self.size


def is_matrix(canonical: str, shape: tuple[int, ...]) -> bool:
    """Return whether a method on matrices merges a tensor as one, or as one for each expert.

    Others are vectors, kernels of convolutions, and what has a row for each token, where a direction of the whole
    would change every token for the sake of a few.
    """
    if canonical in VOCABULARY or min(shape, default=0) < 1 or min(shape[-2:]) == 1:
        return False
    return len(shape) == 2 or (len(shape) == 3 and _EXPERTS in canonical.split("."))


def matrices_of(step: Step, piece: Piece) -> Matrices:
    """The matrices of a piece that a method on matrices merges."""
    rows = sum(stop - start for start, stop in piece.rows)
    models, size = len(piece.reads), 8 if "F64" in (step.dtype, step.source_dtype) else 4
    if len(step.row_shape) == 1:
        return Matrices(1, rows, step.row_shape[0], models, size)
    height, width = step.row_shape
    return Matrices(rows, height, width, models, size)


def decomposed(plan: Plan) -> Iterator[tuple[Step, Piece, Matrices]]:
    """Every piece of a plan that a method on matrices merges; not modules of adapters, whose cores are small."""
    for step, piece, setting in plan.merged_pieces():
        if setting.row.on == "matrices" and step.lora is None:
            yield step, piece, matrices_of(step, piece)


def room_for_matrices(plan: Plan) -> int:
    """Bytes of memory that the matrices which are merged at once may take; 0 where no method works on matrices.

    That is what the largest stored tensor would take if it were one, as embeddings are not, but no more than half of
    the memory that is free now; and what the largest matrix takes in any case.
    """
    needed = [(matrices.room, matrices.models) for _, _, matrices in decomposed(plan)]
    if not needed:
        return 0
    models = max(models for _, models in needed)
    largest = max(prod(step.shape[-2:]) for step in plan.steps if len(step.shape) > 1)
    return max(max(room for room, _ in needed), min((models + _COPIES) * largest * 4, _free_memory() // 2))


def _free_memory() -> int:
    """Bytes of memory that this process can take without others losing theirs, as far as the system tells."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with suppress(OSError, ValueError):  # what a container may take; `max` where it may take all
        group = Path("/sys/fs/cgroup")
        most = int((group / "memory.max").read_text(encoding="ascii"))
        free = min(free, most - int((group / "memory.current").read_text(encoding="ascii")))
    return max(free, 0)
