"""The merges that are timed: what each tool is told to do, and whether what the tools make is the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataset import MODELS, open_tensor

__all__ = ["CASES", "Case", "Likeness", "compare", "sample"]

Recipe = dict[str, Any]
Floats = NDArray[np.float32]

SAMPLED = tuple(
    f"model.{name}.weight"
    for name in ("embed_tokens", "layers.0.input_layernorm", "layers.1.self_attn.k_proj", "layers.3.mlp.down_proj")
)
SAMPLE = 1 << 20  # entries of each, about
BITS = 8  # of bfloat16's fraction, the leading one included


@dataclass(frozen=True)
class Case:
    """A merge of `a` and `b`, or of `a` alone, the same for both tools.

    each      parameters of each model, of which there are as many
    shared    parameters of the merge
    own       parameters that only polymerge has
    mergekit  parameters that only mergekit has; None where it cannot do this merge
    in_float32  whether mergekit computes in float32, where bfloat16 leaves nothing of what it measures
    near      share of the entries in which the outputs have to agree, see `Likeness`
    apart     how far the ratio of their changes may be from 1
    long      whether it takes minutes, so that it is only run where it is named, and once
    """

    method: str
    deltas: bool = True
    each: tuple[Mapping[str, float], ...] = ({}, {})
    shared: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)
    mergekit: Mapping[str, Any] | None = field(default_factory=dict)
    in_float32: bool = False
    near: float = 1.0
    apart: float = 0.02
    long: bool = False

    def agrees(self, likeness: Likeness) -> bool:
        """Whether the two tools have done the same work."""
        return likeness.near >= self.near and abs(likeness.size - 1) < self.apart

    def for_polymerge(self, models: Path) -> Recipe:
        """The recipe for polymerge."""
        return self._recipe(models, self.own)

    def for_mergekit(self, models: Path) -> Recipe:
        """The recipe for mergekit."""
        start = {} if self.deltas or self.method != "slerp" else {"base_model": str(models / "a")}
        dtypes = {"dtype": "float32", "out_dtype": "bfloat16"} if self.in_float32 else {"dtype": "bfloat16"}
        return {**self._recipe(models, self.mergekit or {}), **start, **dtypes}

    def _recipe(self, models: Path, more: Mapping[str, Any]) -> Recipe:
        recipe: Recipe = {"merge_method": self.method}
        if self.deltas:
            recipe["base_model"] = str(models / "base")
        recipe["models"] = [
            {"model": str(models / name), **({"parameters": dict(own)} if own else {})}
            for name, own in zip(("a", "b"), self.each, strict=False)
        ]
        return {**recipe, "parameters": {**self.shared, **more}}


WEIGHTS = ({"weight": 0.6}, {"weight": 0.4})
TRIMMED = ({"weight": 0.6, "density": 0.2}, {"weight": 0.4, "density": 0.2})

CASES = {
    "linear": Case("linear", deltas=False, each=WEIGHTS),
    "task_arithmetic": Case("task_arithmetic", each=WEIGHTS, near=0.999),  # mergekit rounds each operation to bfloat16
    "slerp": Case("slerp", deltas=False, shared={"t": 0.4}),
    # all equals of the threshold are kept, which are many among deltas of bfloat16: mergekit keeps some of them
    "ties": Case("ties", each=TRIMMED, mergekit={"normalize": True}, near=0.9, apart=0.3),
    "ties, trim: model": Case("ties", each=TRIMMED, own={"trim": "model"}, mergekit=None),
    "dare_linear": Case("dare_linear", each=TRIMMED, mergekit={"normalize": False}, near=0.5),
    "dare_ties": Case("dare_ties", each=TRIMMED, shared={"normalize": True}, near=0.5),  # other numbers are drawn
    # all equals of the ends of the band are kept, which are many among deltas of bfloat16
    "breadcrumbs": Case("breadcrumbs", each=TRIMMED, near=0.9, apart=0.3),
    "breadcrumbs_ties": Case("breadcrumbs_ties", each=TRIMMED, near=0.9, apart=0.3),
    "della": Case("della", each=TRIMMED, near=0.5),
    "della_linear": Case("della_linear", each=TRIMMED, near=0.5),
    "sce": Case("sce", shared={"select_topk": 0.2}, near=0.9),
    "nearswap": Case("nearswap", each=({},), shared={"t": 1e-4}, near=0.99),
    # divergences of 2e-8, of which float32 leaves rounding
    "arcee_fusion": Case("arcee_fusion", each=({},), in_float32=True, near=0.8, apart=0.5),
    "ram": Case("ram", near=0.99),
    "ramplus_tl": Case("ramplus_tl", near=0.99),
    "nuslerp": Case("nuslerp", deltas=False, each=WEIGHTS, in_float32=True, near=0.99),
    # norms of large tensors, which mergekit adds up in float32: it loses 9 % and 1 % of the embedding's
    "multislerp": Case("multislerp", deltas=False, each=WEIGHTS, in_float32=True, near=0.6, apart=0.8),
    "karcher": Case("karcher", deltas=False, in_float32=True, near=0.8, apart=0.2),
    "model_stock": Case("model_stock", in_float32=True, near=0.99),
    "metagpt": Case("metagpt", mergekit=None),
    "iso_c": Case("iso_c", mergekit=None, long=True),
    "tsv": Case("tsv", each=WEIGHTS, mergekit=None, long=True),
    "iso_cts": Case("iso_cts", mergekit=None, long=True),
    "optmerge": Case("optmerge", mergekit=None, long=True),
    "swudi": Case("swudi", mergekit=None, long=True),
    "aswudi": Case("aswudi", mergekit=None, long=True),
    "dc_merge": Case("dc_merge", mergekit=None, long=True),
    "ip_merge": Case("ip_merge", each=WEIGHTS, mergekit=None, long=True),
    "task_arithmetic, calibrate: svc": Case(
        "task_arithmetic", each=WEIGHTS, own={"calibrate": "svc"}, mergekit=None, long=True
    ),
}
"""What is timed, by the name that it has on the command line and in the table."""


@dataclass(frozen=True)
class Likeness:
    """How far two outputs agree in a sample of their entries.

    near   share of the entries that differ by no more than one step of bfloat16 at the size of the inputs there
    size   mean magnitude of the change from the base, the one's divided by the other's
    """

    near: float
    size: float


def sample(folder: Path) -> list[Floats]:
    """Some entries of some of a checkpoint's tensors, evenly spread."""
    tensors = [open_tensor(folder, name) for name in SAMPLED]
    return [_wide(tensor[:: tensor.size // SAMPLE | 1]) for tensor in tensors]


def compare(models: Path, ours: list[Floats], theirs: list[Floats]) -> Likeness:
    """Compare samples of two outputs that were merged of the same `models`."""
    inputs = [sample(models / name) for name in MODELS]
    near, count, changes = 0, 0, [0.0, 0.0]
    for one, other, *rows in zip(ours, theirs, *inputs, strict=True):
        step = np.ldexp(np.float32(1), np.frexp(np.max(np.abs(rows), axis=0))[1] - BITS)
        near += int(np.count_nonzero(np.abs(one - other) <= step))
        count += one.size
        for place, output in enumerate((one, other)):
            changes[place] += float(np.abs(output - rows[0]).sum(dtype=np.float64))
    return Likeness(near / count, changes[0] / changes[1])


def _wide(held: NDArray[np.uint16] | Floats) -> Floats:
    """Numbers as float32: BF16 from its bits, others as they are (mergekit writes some merges in float32)."""
    if held.dtype != np.uint16:
        return held.astype(np.float32)
    return (held.astype(np.uint32) << 16).view(np.float32)
