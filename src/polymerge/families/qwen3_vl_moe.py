"""Qwen3-VL with experts: all experts of a layer are one tensor, on disk too.

Published files have each expert transposed against what transformers 5 has in memory; shapes tell the two apart.
"""

from __future__ import annotations

from polymerge.families.qwen3_vl import QWEN3_VL
from polymerge.families.rules import Family

QWEN3_VL_MOE = Family(
    "qwen3_vl_moe",
    rules=QWEN3_VL.rules,
    model_types=("qwen3_vl_moe",),
    architectures=("Qwen3VLMoeForConditionalGeneration",),
    decoders=("qwen3_moe",),
    title="Qwen3-VL (experts)",
    source="Qwen/Qwen3-VL-30B-A3B-Instruct",
    mark="vision.blocks.{i}.mlp.linear_fc1.weight",
)
