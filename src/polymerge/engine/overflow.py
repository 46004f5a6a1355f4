"""Numbers that became infinite by merging: counted as they are written, and refused unless the recipe allows them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from polymerge.checkpoints.tensor_info import listed
from polymerge.dtypes import dtype_name
from polymerge.errors import CheckpointError
from polymerge.methods import kernels
from polymerge.planning import Piece, Plan, Step
from polymerge.recipe.overrides import matches

__all__ = ["Overflow", "checked_while_written", "keeps_bytes"]

_MOST_NAMED: Final = 8


class Overflow:
    """The numbers of a plan's output that are not finite, for each of its tensors.

    Every number that was read is finite, or the merge has ended with the file that it is in. So an infinity is a number
    too large for the dtype that it is written in, or for that which it was computed in, and NaN is what came of one.
    """

    def __init__(self, plan: Plan) -> None:
        globs = plan.recipe.get("overflow") or ()
        self._allowed = (globs,) if isinstance(globs, str) else tuple(globs)
        self._refused = Counter[tuple[str, str]]()
        self._lock = threading.Lock()
        self.allowed = Counter[str]()
        """The infinities in each tensor, by its stored name, that `overflow` of the recipe allows; never NaN."""

    def count(self, canonical: str, name: str, dtype: str, raw: Any) -> None:
        """Count what is not finite in bytes of the stored tensor `name`, by the canonical name that globs match."""
        infinite, nan = kernels.not_finite(np.frombuffer(raw, np.uint8), dtype)
        names = (canonical, f"{canonical}.weight")  # a module of an adapter, like in exclude, or its weight
        allowed = any(matches(one, glob) for one in names for glob in self._allowed)
        with self._lock:
            if allowed and infinite:
                self.allowed[name] += infinite
            elif infinite:
                self._refused[canonical, dtype_name(dtype)] += infinite
            if nan:
                self._refused[canonical, "NaN"] += nan

    def counts(self) -> tuple[Counter[str], Counter[tuple[str, str]]]:
        """What has been counted: of what is allowed, and of what is not."""
        return self.allowed, self._refused

    def add(self, allowed: Counter[str], refused: Counter[tuple[str, str]]) -> None:
        """Add the `counts` of another part of the output."""
        self.allowed += allowed
        self._refused += refused

    def warnings(self) -> Iterator[str]:
        """A sentence on the infinities that are allowed, if there are any."""
        if self.allowed:
            held = [f"{name} ({count})" for name, count in sorted(self.allowed.items())]
            yield (
                f"{self.allowed.total()} numbers are infinite in the output, as overflow in the recipe allows: "
                f"{listed(held, _MOST_NAMED)}"
            )

    def refuse(self) -> None:
        """Raise CheckpointError, with every tensor and its count, if there is anything that is not allowed."""
        if not self._refused:
            return
        held = [
            f"{canonical} ({count} of NaN)" if dtype == "NaN" else f"{canonical} ({count} too large for {dtype})"
            for (canonical, dtype), count in sorted(self._refused.items())
        ]
        numbers, tensors = self._refused.total(), len({canonical for canonical, _ in self._refused})
        raise CheckpointError(
            f"{numbers} number{'s' if numbers > 1 else ''} in {tensors} tensor{'s' if tensors > 1 else ''} "
            f"overflow{'' if numbers > 1 else 's'} in this merge: "
            f"{listed(held, _MOST_NAMED)}. Lower weight or scale, choose a dtype with room for them, or name tensors "
            "that may hold infinities in overflow"
        )


def keeps_bytes(step: Step, piece: Piece) -> bool:
    """Return whether rows of a step's tensor have the bytes that lie in a file, and are not computed."""
    its_own = not piece.inputs or not piece.reads
    return piece.setting is None and (step.lora is not None or (step.dtype == step.source_dtype and its_own))


def checked_while_written(plan: Plan) -> frozenset[str]:
    """The stored names of the tensors of which every number is computed, so that none can be infinite unnoticed."""
    return frozenset(
        name
        for step in plan.steps
        if step.pieces and not any(keeps_bytes(step, piece) for piece in step.pieces)
        for name in step.stored
    )
