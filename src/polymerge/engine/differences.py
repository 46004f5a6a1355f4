"""Differences between two checkpoints, tensor by tensor: measured, decomposed, or handed on in full."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polymerge.dtypes import BITS, byte_count
from polymerge.engine.blocks import PieceBlocks, Workspace
from polymerge.engine.device import open_device
from polymerge.engine.extents import Files
from polymerge.errors import CheckpointError
from polymerge.methods import kernels
from polymerge.methods.leading import energy_of, leading, residual
from polymerge.methods.lora import Factors
from polymerge.planning import Piece
from polymerge.planning.estimate import BLOCK
from polymerge.planning.extraction import Difference, Extraction

__all__ = ["Differences", "Found"]

Bytes = Any
"""Bytes of a tensor, uint8 [bytes]."""


@dataclass(frozen=True)
class Found:
    """What the values of a difference tell.

    energy  its squared Frobenius norm
    lost    that of what its factors, as they are stored, leave out of it
    rank    of the factors; 0 without any
    """

    energy: float
    lost: float = 0.0
    rank: int = 0

    @property
    def norm(self) -> float:
        """Its Frobenius norm."""
        return sqrt(self.energy)

    @property
    def error(self) -> float:
        """The relative error of the factors in the Frobenius norm."""
        return sqrt(self.lost / self.energy) if self.energy else 0.0

    def to_json(self) -> dict[str, Any]:
        """The entry of polymerge.json."""
        return {"rank": self.rank, "norm": self.norm, "error": self.error}


class Differences:
    """Reads differences; factors wait in a file until all ranks are known, so that memory does not grow with them.

    scratch  the file, which is created, or holds the factors of a run that was killed
    dtype    of the factors, as in safetensors
    """

    def __init__(self, plan: Extraction, scratch: Path, dtype: str) -> None:
        self._plan, self._dtype = plan, dtype
        self._files, self._workspace = Files(), Workspace(open_device("cpu"))
        self._ranks: dict[str, int] = {}
        self._starts: dict[str, int] = {}
        end = 0
        for one in plan.low_rank:
            self._starts[one.name] = end
            end += byte_count(dtype, (min(plan.wanted.most, *one.shape), sum(one.shape)))
        self._scratch = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        os.ftruncate(self._scratch, end)

    def __enter__(self) -> Differences:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._scratch)
        self._files.close()

    def measured(self, one: Difference) -> Found:
        """The norm of a difference, block by block; a resized vocabulary counts as one that differs."""
        if one.resized:
            return Found(float("inf"))
        blocks = self._blocks(one)
        each = (blocks.read(index).models[0] for index in range(len(blocks.sizes)))
        return Found(sum(float(np.square(block, dtype=np.float64).sum()) for block in each))

    def decomposed(self, one: Difference) -> Found:
        """Decompose a difference and keep its factors, rounded once; none if there is no difference.

        raises CheckpointError if values are NaN or infinite, or too large for the dtype of the factors.
        """
        blocks, start = self._blocks(one), 0
        flat = np.empty(prod(one.shape), np.float32)
        for index, size in enumerate(blocks.sizes):
            flat[start : start + size] = blocks.read(index).models[0]
            start += size
        matrix = flat.reshape(one.shape)
        if one.transposed:
            matrix = np.ascontiguousarray(matrix.T)
        if not (energy := energy_of(matrix)):
            return Found(0.0)
        wanted = self._plan.wanted
        factors = leading(matrix, wanted.most, wanted.energy)
        raw, rounded = zip(*(self._rounded(one, factor) for factor in (factors.a, factors.b)), strict=True)
        place = self._starts[one.name]
        for held in raw:
            _write_at(self._scratch, held, place)
            place += len(held)
        self._ranks[one.name] = factors.rank
        return Found(energy, residual(matrix, Factors(rounded[1], rounded[0])), factors.rank)

    def factors(self, one: Difference) -> tuple[Bytes, Bytes]:
        """The bytes of the factors a and b that `decomposed` has kept."""
        rank, (out, width) = self._ranks[one.name], one.shape[:: -1 if one.transposed else 1]
        sizes, place = [byte_count(self._dtype, (rank, side)) for side in (width, out)], self._starts[one.name]
        a, b = (np.empty(size, np.uint8) for size in sizes)
        _read_at(self._scratch, a, place)
        _read_at(self._scratch, b, place + len(a))
        return a, b

    def digest(self, one: Difference, rank: int) -> str:
        """The sha256 of the factors that are kept for a difference, if they are of this rank."""
        self._ranks[one.name] = rank
        digest = hashlib.sha256()
        for raw in self.factors(one):
            digest.update(raw)
        return digest.hexdigest()

    def whole(self, one: Difference) -> Iterator[tuple[int, Bytes]]:
        """The fine-tune's tensor block by block: the first byte of each and its bytes, valid until the next."""
        blocks = self._blocks(one, alone=True)
        width, start = BITS[one.dtype] // 8, 0
        for index, size in enumerate(blocks.sizes):
            raw = np.empty(size * width, np.uint8)
            # a sum of one gives numbers, whatever form the block has
            kernels.encode(kernels.weighted_sum(blocks.read(index).models, [1.0]), one.dtype, raw)
            yield start, raw
            start += len(raw)

    def _blocks(self, one: Difference, *, alone: bool = False) -> PieceBlocks:
        models = (self._plan.tuned,) if alone else (self._plan.tuned, self._plan.base)
        piece = Piece(one.canonical, ((0, one.shape[0] if one.shape else 1),), reads=(one.tuned,))
        if not alone:
            piece = Piece(one.canonical, piece.rows, reads=(one.tuned,), base=one.base)
        labels, entries = [model.label for model in models], [model.entries for model in models]
        return PieceBlocks(piece, labels, entries, self._files, self._workspace, BLOCK, one.dtype == "F64")

    def _rounded(self, one: Difference, factor: NDArray[np.float32]) -> tuple[Bytes, NDArray[np.float32]]:
        """The bytes of a factor, and the numbers that they are."""
        raw: Bytes = np.empty(byte_count(self._dtype, factor.shape), np.uint8)
        numbers: Any = np.empty(factor.size, np.float32)
        kernels.encode(factor.reshape(-1), self._dtype, raw)
        if not kernels.decode(raw, self._dtype, numbers):
            raise CheckpointError(
                f"{self._plan.tuned.path}: the factors of {one.canonical} are too large for {self._dtype}. Say "
                "dtype: float32"
            )
        return raw, numbers.reshape(factor.shape)


def _write_at(descriptor: int, raw: Bytes, place: int) -> None:
    view, done = memoryview(raw), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], place + done)


def _read_at(descriptor: int, raw: Bytes, place: int) -> None:
    view, done = memoryview(raw), 0
    while done < len(view):
        done += os.preadv(descriptor, [view[done:]], place + done)
