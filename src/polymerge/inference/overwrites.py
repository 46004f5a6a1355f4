"""Values that no checkpoint holds, written to tensors of a live model, such as the replacements in a knockout."""

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
    """Rows of a stored tensor whose values `fill` replaces; it is given those that the plan left there.

    rows     as in the pieces of its step; each block is within one matrix if the step has a view
    view     the step's view
    fill     called with the stacked rows, in the output's dtype; picklable, with a repr that shows all it depends on
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
    """A plan after which some tensors get values that no checkpoint holds; for `LiveModel`, not for `merge`."""

    overwrites: tuple[Overwrite, ...] = ()

    @property
    def hash(self) -> str:
        """sha256 of what a live model computes: the plan's, and the overwrites."""
        return hashlib.sha256(f"{super().hash}\0{self.overwrites}".encode()).hexdigest()
