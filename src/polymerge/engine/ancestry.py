"""Check from the norms of sampled deltas whether the base is an ancestor of the models.

Fine-tuning changes weights by a small fraction. Unrelated models are nearly orthogonal, so that the delta
between two of them is at least as long as the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, inf, sqrt
from typing import Any, Final

from polymerge.checkpoints import TensorInfo
from polymerge.engine.blocks import PieceBlocks, Workspace
from polymerge.engine.device import open_device
from polymerge.engine.extents import Files
from polymerge.methods import kernels
from polymerge.planning import Plan, Step

__all__ = ["FAR", "DeltaNorm", "ancestry_warnings", "delta_norms"]

FAR: Final = 0.5
"""Ratio of delta norm to base norm that triggers a warning: half of the smallest ratio between unrelated models."""

_PIECES: Final = 512
_ELEMENTS: Final = 4096
"""Number of pieces in the sample, and of elements from the middle of each: 8 MB of BF16 numbers per model."""


@dataclass(frozen=True)
class DeltaNorm:
    """The distance of a model from the base, in a sample of the merged tensors.

    ratio    norm of the model's delta over that of the base, over the matrices of the sample; inf for a base of zeros
    equal    whether the model equals the base in the whole sample, vectors included
    pieces   the number of pieces in the sample
    """

    ratio: float
    equal: bool
    pieces: int


def delta_norms(plan: Plan, entries: Sequence[Mapping[str, TensorInfo]]) -> dict[str, DeltaNorm]:
    """Compare each model, by its label, with the base in a sample of the tensors merged as deltas; {} without a base.

    entries  for each of the plan's inputs, the location of its tensors

    The sample is deterministic: up to 512 pieces, spread evenly over the plan, and 4096 elements of each.
    """
    if plan.base is None:
        return {}
    every = [(step, piece) for step, piece, _ in plan.merged_pieces() if piece.base is not None]
    stride = max(-(-len(every) // _PIECES), 1)
    sample = every[::stride]
    workspace = Workspace(open_device("cpu"))
    squares: dict[int, list[float]] = {place: [] for place in dict.fromkeys(plan.models) if place != plan.base}
    of_base: list[float] = []
    equal = dict.fromkeys(squares, True)
    inputs = [*plan.models, plan.base]
    labels, tensors = [plan.inputs[place].label for place in inputs], [entries[place] for place in inputs]
    with Files() as files:
        for step, piece in sample:
            blocks = PieceBlocks(piece, labels, tensors, files, workspace, _ELEMENTS, wide=True)
            if not blocks.count:
                continue
            block = blocks.read(len(blocks.sizes) // 2)
            deltas = dict(zip(plan.models, block.models, strict=True))
            for place in squares:
                equal[place] = equal[place] and not deltas[place].any()
            if _is_matrix(step) and block.base is not None:
                of_base.append(_square(block.base))
                for place, found in squares.items():
                    found.append(_square(deltas[place]))
    if not sample:
        return {}
    length = sqrt(fsum(of_base))
    return {
        plan.inputs[place].label: DeltaNorm(_ratio(sqrt(fsum(found)), length), equal[place], len(sample))
        for place, found in squares.items()
    }


def ancestry_warnings(norms: Mapping[str, DeltaNorm], base: str) -> Iterator[str]:
    """Sentences on models that do not seem to descend from the base, and on models that equal it."""
    far = [f"'{label}' by {norm.ratio:.2f}" for label, norm in norms.items() if norm.ratio >= FAR and not norm.equal]
    same = [f"'{label}'" for label, norm in norms.items() if norm.equal]
    if far:
        yield (
            f"base_model '{base}' does not look like the common ancestor: models differ from it by so many times its "
            f"norm: {', '.join(far)}. Fine-tuning changes a small part, and models that share nothing differ by 1 or "
            "more. Name the checkpoint that they were trained from"
        )
    if same:
        pieces = next(iter(norms.values())).pieces
        yield (
            f"{' and '.join(same)} {'are' if len(same) > 1 else 'is'} equal to base_model '{base}' in all {pieces} "
            "tensors of a sample: such a delta adds nothing to the merge"
        )


def _is_matrix(step: Step) -> bool:
    """Return whether a step's tensor is a matrix; norm weights, near 1 and hardly trained, would dominate the sums."""
    return len(step.row_shape) > 0


def _square(values: Any) -> float:
    """The squared norm of float64 numbers [n], summed in a fixed order."""
    return float(kernels.gram_of(values[None])[0, 0])


def _ratio(delta: float, base: float) -> float:
    """The ratio rounded to four digits, so that records do not depend on a machine's summation order."""
    return float(f"{delta / base:.4g}") if base else (inf if delta else 0.0)
