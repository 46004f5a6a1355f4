"""Write matrices that lie transposed in the output: what is computed as their rows are columns there."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polymerge.checkpoints.shards import Write
from polymerge.dtypes import BITS
from polymerge.methods.kernels.cpu.matrices import transpose
from polymerge.planning import Step

__all__ = ["Turning"]


@dataclass
class _Begun:
    """A matrix as it will lie in the file, and how many of its rows are still to come."""

    lying: NDArray[Any]
    missing: int


class Turning:
    """Gathers the rows of each matrix, from any thread, and writes the matrix in one go when it has them all.

    Column by column it would be a call for every few hundred bytes.

    write   where the bytes go, as for `execute`
    """

    def __init__(self, write: Write) -> None:
        self._write, self._lock = write, Lock()
        self._begun: dict[tuple[str, int], _Begun] = {}
        self._done: list[NDArray[Any]] = []

    def put(self, step: Step, row: int, raw: memoryview) -> None:
        """Take whole rows of one matrix of a transposed tensor, the first of them row `row` of the tensor's view."""
        _, columns, rows = step.shape
        matrix, first = divmod(row, rows)
        bits = np.dtype(f"u{BITS[step.dtype] // 8}")
        block = np.frombuffer(raw, bits).reshape(-1, columns)
        with self._lock:
            begun = self._begun.get((step.name, matrix))
            if begun is None:
                begun = self._begun[step.name, matrix] = _Begun(self._matrix(columns, rows, bits), rows)
        transpose(block, begun.lying[:, first : first + len(block)])
        with self._lock:
            begun.missing -= len(block)
            if begun.missing:
                return
            del self._begun[step.name, matrix]
        self._write(step.name, begun.lying.reshape(-1).view("u1").data, matrix * begun.lying.nbytes)
        with self._lock:
            self._done.append(begun.lying)

    def finish(self) -> None:
        """Make sure that every matrix that was begun has been written."""
        assert not self._begun, f"rows are missing in {sorted(self._begun)[:3]}"

    def _matrix(self, columns: int, rows: int, bits: np.dtype[Any]) -> NDArray[Any]:
        """Room for a matrix: that of one which is written, if it was of this size."""
        while self._done:
            again = self._done.pop()
            if again.size == columns * rows and again.dtype == bits:
                return again.reshape(columns, rows)
        return np.empty((columns, rows), bits)
