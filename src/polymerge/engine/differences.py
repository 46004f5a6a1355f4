"""Differences between two checkpoints, tensor by tensor: measured, decomposed, or handed on in full."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from polymerge.dtypes import BITS, byte_count
from polymerge.engine.blocks import PieceBlocks, Workspace
from polymerge.engine.device import open_device
from polymerge.engine.extents import Files
from polymerge.errors import CheckpointError
from polymerge.methods import kernels
from polymerge.methods.leading import energy_of, largest, leading, rank_for, residual, residuals, room_for
from polymerge.methods.lora import Factors
from polymerge.planning import Piece
from polymerge.planning.difference import Difference, Extraction
from polymerge.planning.estimate import BLOCK

__all__ = ["Differences", "Found", "room_of"]

_BLOCK: Final = 4 << 20
"""Bytes of the factors of experts that are put side by side at a time."""

Bytes = Any
"""Bytes of a tensor, uint8 [bytes]."""


@dataclass(frozen=True)
class Found:
    """What the values of a difference tell.

    energy  its squared Frobenius norm
    lost    that of what its factors, as they are stored, leave out of it
    rank    of the factors; 0 without any
    experts  the number of matrices that these numbers are of together; 0 for one
    """

    energy: float
    lost: float = 0.0
    rank: int = 0
    experts: int = 0

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
        experts = {"experts": self.experts} if self.experts else {}
        return {"rank": self.rank, "norm": self.norm, "error": self.error} | experts


class Differences:
    """Reads differences; factors wait in a file until all ranks are known, so that memory does not grow with them.

    Experts of one parameter share a rank, which all of them decide: the factors of each wait there at the highest rank,
    with the squared norms that its first components hold and leave, and those of that rank are written in the end.

    scratch  the file, which is created, or holds the factors of a run that was killed
    dtype    of the factors, as in safetensors
    """

    def __init__(self, plan: Extraction, scratch: Path, dtype: str) -> None:
        self._plan, self._dtype = plan, dtype
        self._files, self._workspace = Files(), Workspace(open_device("cpu"))
        self._starts: dict[str, int] = {}
        end = 0
        for one in plan.low_rank:
            self._starts[one.name] = end
            end += self._slot(one) * (one.experts or 1)
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

    def decomposed(self, one: Difference, number: int) -> Found:
        """Decompose a difference, or that of an expert, and keep its factors, rounded once; none if there is no
        difference. What the factors of an expert leave out is left to `together`.

        raises CheckpointError if values are NaN or infinite, or too large for the dtype of the factors.
        """
        matrix = self._matrix(one.matrix(number))
        energy, place = energy_of(matrix), self._place(one, number)
        if one.experts:
            self._keep_expert(one, matrix, energy, place)
            return Found(energy, 0.0, self._plan.most(one))
        if not energy:
            return Found(0.0)
        wanted = self._plan.wanted
        factors, raw = self._rounded(one, leading(matrix, wanted.most, wanted.energy))
        _write_at(self._scratch, raw, place)
        return Found(energy, residual(matrix, factors), factors.rank)

    def _keep_expert(self, one: Difference, matrix: NDArray[np.float32], energy: float, place: int) -> None:
        """Keep the factors of an expert at the highest rank, and what each rank holds and leaves."""
        most = self._plan.most(one)
        if not energy:
            _write_at(self._scratch, np.zeros(self._slot(one), np.uint8), place)
            return
        parts = largest(matrix, most)
        held = np.cumsum(np.square(parts.s[:most]))
        told = np.stack([np.pad(held, (0, most - len(held)), mode="edge"), np.empty(most)])
        factors, raw = self._rounded(one, parts.factors(most))
        told[1] = residuals(matrix, factors)
        _write_at(self._scratch, np.concatenate([raw, told.reshape(-1).view(np.uint8)]), place)

    def together(self, one: Difference, energies: Sequence[float]) -> Found:
        """What the experts of a parameter are, each decomposed, and the rank of all of them: the one that is asked for,
        or the smallest one that holds the share of their energies together.
        """
        if not (whole := sum(energies)):
            return Found(0.0)
        told, size = np.zeros((2, self._plan.most(one))), 16 * self._plan.most(one)
        for number in range(one.experts):
            raw: Bytes = np.empty(size, np.uint8)
            _read_at(self._scratch, raw, self._place(one, number) + self._slot(one) - size)
            told += raw.view(np.float64).reshape(told.shape)
        share = self._plan.wanted.energy
        rank = self._plan.most(one) if share is None else rank_for(told[0], whole, share)
        return Found(whole, float(told[1, rank - 1]), rank, one.experts)

    def _matrix(self, one: Difference) -> NDArray[np.float32]:
        """The difference as a matrix [out, in]."""
        blocks, start = self._blocks(one), 0
        flat = np.empty(prod(one.shape), np.float32)
        for index, size in enumerate(blocks.sizes):
            flat[start : start + size] = blocks.read(index).models[0]
            start += size
        matrix = flat.reshape(one.shape)
        if one.transposed:
            matrix = np.ascontiguousarray(matrix.T)
        return matrix

    def factors(self, one: Difference, rank: int) -> Iterator[tuple[str, int, Bytes]]:
        """The factors of a difference as PEFT has them: bytes of a or of b, and the first one's place in the whole.

        Of experts, the rows of a are those of one after the other, and the columns of b of the first component of
        each, of the second, and so on.
        """
        (out, width), number = one.sides, BITS[self._dtype] // 8
        if not one.experts:
            for side, size, place in (("A", width, 0), ("B", out, rank * width * number)):
                raw: Bytes = np.empty(rank * size * number, np.uint8)
                _read_at(self._scratch, raw, self._starts[one.name] + place)
                yield side, 0, raw
            return
        for expert in range(one.experts):
            raw = np.empty(rank * width * number, np.uint8)
            _read_at(self._scratch, raw, self._place(one, expert))
            yield "A", expert * len(raw), raw
        most = self._plan.most(one)
        height = max(1, _BLOCK // (one.experts * most * number))
        for start in range(0, out, height):
            rows = np.empty((one.experts, min(height, out - start), most), f"u{number}")
            for expert, held in enumerate(rows):
                place = self._place(one, expert) + (most * width + start * most) * number
                _read_at(self._scratch, held.view(np.uint8), place)
            beside = np.ascontiguousarray(rows[:, :, :rank].transpose(1, 2, 0))
            yield "B", start * rank * one.experts * number, beside.reshape(-1).view(np.uint8)

    def digest(self, one: Difference, number: int, rank: int) -> str:
        """The sha256 of what is kept for a difference, or for an expert, if its factors are of this rank."""
        raw: Bytes = np.empty(self._slot(one) if one.experts else byte_count(self._dtype, (rank, sum(one.sides))), "u1")
        _read_at(self._scratch, raw, self._place(one, number))
        return hashlib.sha256(raw).hexdigest()

    def _slot(self, one: Difference) -> int:
        """The bytes that are kept of a matrix: of its factors, and of what each rank holds and leaves of an expert."""
        most = self._plan.most(one)
        return byte_count(self._dtype, (most, sum(one.sides))) + (16 * most if one.experts else 0)

    def _place(self, one: Difference, number: int) -> int:
        return self._starts[one.name] + number * self._slot(one)

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

    def _rounded(self, one: Difference, factors: Factors) -> tuple[Factors, Bytes]:
        """Factors as they are stored, and the bytes of a and b."""
        flat = np.concatenate([factors.a.reshape(-1), factors.b.reshape(-1)])
        raw: Bytes = np.empty(byte_count(self._dtype, flat.shape), np.uint8)
        numbers: Any = np.empty(flat.size, np.float32)
        kernels.encode(flat, self._dtype, raw)
        if not kernels.decode(raw, self._dtype, numbers):
            raise CheckpointError(
                f"{self._plan.tuned.path}: the factors of {one.canonical} are too large for {self._dtype}. Say "
                "dtype: float32"
            )
        a, b = np.split(numbers, [factors.a.size])
        return Factors(b.reshape(factors.b.shape), a.reshape(factors.a.shape)), raw


def room_of(plan: Extraction) -> int:
    """Bytes of memory in which the largest matrix of an extraction is decomposed, at most."""
    # one that lies transposed is there twice
    each = (room_for(*one.sides, plan.most(one)) + 4 * one.transposed * prod(one.sides) for one in plan.low_rank)
    return max(each, default=0)


def _write_at(descriptor: int, raw: Bytes, place: int) -> None:
    view, done = memoryview(raw), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], place + done)


def _read_at(descriptor: int, raw: Bytes, place: int) -> None:
    view, done = memoryview(raw), 0
    while done < len(view):
        done += os.preadv(descriptor, [view[done:]], place + done)
