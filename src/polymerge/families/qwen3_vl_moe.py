"""Qwen3-VL with experts: all experts of a layer are one tensor, on disk too.

So it can be merged with its like, and with a Qwen3 whose experts lie one by one only where its experts are excluded.
Published files have each expert transposed against those that transformers 5 writes; their shapes tell them apart.
"""

from __future__ import annotations

from polymerge.families.qwen3_vl import QWEN3_VL
from polymerge.mapping import Family

QWEN3_VL_MOE = Family(
    "qwen3_vl_moe",
    rules=QWEN3_VL.rules,
    model_types=("qwen3_vl_moe",),
    architectures=("Qwen3VLMoeForConditionalGeneration",),
    decoders=("qwen3_moe",),
    title="Qwen3-VL (experts)",
    source="Qwen/Qwen3-VL-30B-A3B-Instruct",
)
