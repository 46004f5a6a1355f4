"""Whole matrices, for methods that need them: which tensors are some, and what decomposing them costs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Final

from polymerge.errors import human_size
from polymerge.methods.method import Method
from polymerge.planning.model import VOCABULARY
from polymerge.planning.plan import Piece, Plan, Step
from polymerge.recipe.parameters import Setting

__all__ = ["Matrices", "cost_words", "decomposed", "free_memory", "is_matrix", "matrices_of", "room_for_matrices"]
__all__ += ["work_of"]

_EXPERTS: Final = "experts"
"""What a tensor of three dimensions has in its name where it holds a matrix per expert, and no kernel."""

_BY_ENTRIES, _CALIBRATED = (2.0, 0.0), (1.0, 3.4)
"""What a method on blocks holds beside the deltas of a matrix, and its calibration; see `Method.holds`."""
_WITHOUT_SCIPY: Final = 0.0 if find_spec("scipy") else 3.0
"""Squares more where numpy finds the eigenvectors."""
_BLOCKS: Final = 12 << 20
"""Bytes of the rows that are read, widened and multiplied at a time."""

_PRODUCT, _EIGENVECTORS = 4 / 70e9, 2.6e-10
"""Seconds of one core for a decomposition, times q p^2 and p^3, where p is the decomposed side of a matrix and q the
other: measured for p of 512 to 2048 with OpenBLAS on a core that does 70e9 operations a second in float64.
"""


@dataclass(frozen=True)
class Matrices:
    """The matrices of a piece: `count` of them, each [rows, columns], of `models` models; `size` bytes a number.

    row         the method that merges them
    calibrated  whether the merged matrix is calibrated afterwards
    """

    count: int
    rows: int
    columns: int
    models: int
    size: int
    row: Method
    calibrated: bool = False

    @property
    def side(self) -> int:
        """The side of what is decomposed: the smaller one, or that of the inputs."""
        if self.row.decomposes_inputs:
            return min(self.columns, self.models * self.rows)
        return min(self.rows, self.columns)

    @property
    def room(self) -> int:
        """Bytes of memory in which one of them is merged."""
        matrix, square = self.rows * self.columns * self.size, 8 * self.side**2
        below = self.row.decomposes_inputs and self.columns > self.side
        needs = [(self.row.holds[0], self.row.holds_below if below else self.row.holds[1])]
        if self.row.on != "matrices":
            needs = [_BY_ENTRIES]
        if self.calibrated:
            needs.append(_CALIBRATED)
        beside = max(matrices * matrix + (squares + _WITHOUT_SCIPY) * square for matrices, squares in needs)
        return int(self.models * matrix + beside) + _BLOCKS

    @property
    def seconds(self) -> float:
        """Seconds that a core takes for all of them, by the number of decompositions, to a factor of two or so."""
        p, q = self.side, max(self.rows, self.columns)
        for_each, beside = self.row.decomposes
        products, eigenvectors = _PRODUCT * q * p**2, _EIGENVECTORS * p**3
        decompositions = for_each * self.models + beside + self.calibrated
        # a calibration multiplies each model's delta by the directions of the merged one
        calibrations = self.models * self.calibrated
        return self.count * (decompositions * (products + eigenvectors) + calibrations * products)


def is_matrix(canonical: str, shape: tuple[int, ...]) -> bool:
    """Return whether a method on matrices merges a tensor as one, or as one for each expert.

    Others are vectors, kernels of convolutions, and what has a row for each token, where a direction of the whole
    would change every token for the sake of a few.
    """
    if canonical in VOCABULARY or min(shape, default=0) < 1 or min(shape[-2:]) == 1:
        return False
    return len(shape) == 2 or (len(shape) == 3 and _EXPERTS in canonical.split("."))


def matrices_of(step: Step, piece: Piece, setting: Setting) -> Matrices:
    """The matrices of a piece whose setting needs whole ones."""
    own = setting.row, setting.calibration is not None
    rows = sum(stop - start for start, stop in piece.rows)
    models, size = len(piece.reads), 8 if "F64" in (step.dtype, step.source_dtype) else 4
    if len(step.row_shape) == 1:
        return Matrices(1, rows, step.row_shape[0], models, size, *own)
    height, width = step.row_shape
    return Matrices(rows, height, width, models, size, *own)


def decomposed(plan: Plan) -> Iterator[tuple[Piece, Matrices]]:
    """Every piece of a plan whose setting needs whole matrices; not modules of adapters, whose cores are small."""
    for step, piece, setting in plan.merged_pieces():
        if setting.whole and step.lora is None:
            yield piece, matrices_of(step, piece, setting)


def work_of(plan: Plan) -> tuple[int, float]:
    """The number of whole matrices that a plan merges, and the seconds that a core takes for all of them."""
    found = [matrices for _, matrices in decomposed(plan)]
    return sum(one.count for one in found), sum(one.seconds for one in found)


def cost_words(plan: Plan) -> str:
    """What the matrices of a plan cost, as text; empty if there are none."""
    found = [matrices for _, matrices in decomposed(plan)]
    if not found:
        return ""
    seconds, largest = sum(matrices.seconds for matrices in found), max(matrices.room for matrices in found)
    time = next(
        f"{seconds / length:.2g} core {name}{'s' if f'{seconds / length:.2g}' != '1' else ''}"
        for length, name in ((3600.0, "hour"), (60.0, "minute"), (1.0, "second"))
        if seconds >= length or length == 1
    )
    count = sum(matrices.count for matrices in found)
    several = f", up to {human_size(_most_room(plan))} for several at once" if count > 1 else ""
    return f"{count} {'matrices' if count > 1 else 'matrix'}, about {time}; memory: {human_size(largest)}{several}"


def room_for_matrices(plan: Plan) -> int:
    """Bytes of memory that matrices which are merged at once may take together; 0 where no method works on matrices.

    No more than half of what is free now, but at least what the largest matrix takes.
    """
    largest = max((matrices.room for _, matrices in decomposed(plan)), default=0)
    return max(largest, min(_most_room(plan), free_memory() // 2)) if largest else 0


def _most_room(plan: Plan) -> int:
    """T + 4 times the largest tensor in float32, such as an embedding, or what one matrix takes if that is more."""
    found = [matrices for _, matrices in decomposed(plan)]
    tensor = 4 * max(prod(step.shape[-2:]) for step in plan.steps if len(step.shape) > 1)
    return max(*(one.room for one in found), (max(one.models for one in found) + 4) * tensor)


def free_memory() -> int:
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
