"""What a method has to know of more than one block: exact cutoffs and dot products, gathered block by block."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from polymerge.engine.blocks import PieceBlocks
from polymerge.engine.thresholds import exact_cutoffs
from polymerge.methods import kernels
from polymerge.methods.ties import kept

__all__ = ["cutoffs", "draw_keys", "gram"]

T = TypeVar("T")
RunAll = Callable[[Callable[[int], T], Iterable[int]], Iterable[T]]


class _Joined:
    """The blocks of several pieces, one piece after the other, as if they were one tensor."""

    def __init__(self, pieces: Sequence[PieceBlocks]) -> None:
        self._places = [(piece, index) for piece in pieces for index in range(len(piece.sizes))]
        self.sizes: Sequence[int] = [size for piece in pieces for size in piece.sizes]

    def read(self, index: int) -> Any:
        piece, own = self._places[index]
        return piece.read(own).models


def cutoffs(pieces: Sequence[PieceBlocks], density: Sequence[float], run_all: RunAll[Any]) -> list[float]:
    """Each model's cutoff over all of the pieces together.

    density   share of the entries that each model keeps; see `polymerge.methods.ties.kept`
    """
    total = sum(piece.count for piece in pieces)
    return exact_cutoffs(_Joined(pieces), kept(density, len(density), total), run_all)


def gram(pieces: Sequence[PieceBlocks], run_all: RunAll[Any]) -> np.ndarray:
    """Dot products of the models with each other over all of the pieces together, float64 [model, model].

    The blocks of a piece have to begin at multiples of `CELL`, over which sums are taken in a
    fixed order; sums over cells are exact, so the result does not depend on the blocks.
    """
    places = [(piece, index) for piece in pieces for index in range(len(piece.sizes))]

    def look(number: int) -> np.ndarray:
        piece, index = places[number]
        return kernels.dots(piece.read(index).models)

    cells = [cell for block in run_all(look, range(len(places))) for cell in block]
    models = range(len(cells[0]))
    return np.array([[math.fsum(cell[i, j] for cell in cells) for j in models] for i in models], np.float64)


def draw_keys(seed: int, places: Sequence[int], canonical: str) -> list[int]:
    """A key of 64 bits for the random draws of each model on one tensor.

    It depends on the seed, the model's place in the recipe and the tensor's canonical name, and on nothing else.
    """
    digests = [hashlib.sha256(f"{seed}\0{place}\0{canonical}".encode()).digest() for place in places]
    return [int.from_bytes(digest[:8], "little") for digest in digests]
