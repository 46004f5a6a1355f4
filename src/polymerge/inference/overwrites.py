"""Numbers that no checkpoint holds, put into tensors of a live model: what a knockout leaves in place of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from polymerge.families.expressions import Ranges, Stacked
from polymerge.planning import Plan

__all__ = ["Overwrite", "Overwritten"]


@dataclass(frozen=True)
class Overwrite:
    """Rows of a tensor, by its name on disk, whose numbers `fill` replaces; it is given those that a plan left there.

    rows     as the pieces of its step have them, each block of one matrix where the step has a view
    view     that of the step
    fill     of the rows stacked, in the output's dtype; it can be pickled, and its repr says all that it depends on
    """

    name: str
    rows: Ranges
    fill: Callable[[Tensor], Tensor]
    view: Stacked | None = None

    def carry_out(self, tensor: Tensor) -> None:
        """Replace the rows in place."""
        blocks = [self._block(tensor, start, stop) for start, stop in self.rows]
        filled = torch.split(self.fill(torch.cat(blocks)), [len(block) for block in blocks])
        for block, numbers in zip(blocks, filled, strict=True):
            block.copy_(numbers)

    def _block(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        if self.view is None:
            return tensor[start:stop]
        matrices = tensor.mT if self.view.transposed else tensor
        matrix, first = divmod(start, matrices.shape[1])
        return matrices[matrix, first : first + stop - start]


@dataclass(frozen=True)
class Overwritten(Plan):
    """A plan after which some tensors get numbers that no checkpoint holds; for a `LiveModel`, not for `merge`."""

    overwrites: tuple[Overwrite, ...] = ()

    @property
    def hash(self) -> str:
        """sha256 of what a live model computes: that of the plan, and what is overwritten."""
        return hashlib.sha256(f"{super().hash}\0{self.overwrites}".encode()).hexdigest()
