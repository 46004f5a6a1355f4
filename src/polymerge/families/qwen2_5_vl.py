"""Qwen2.5-VL: Qwen2-VL's outer names, another vision tower inside."""

from __future__ import annotations

from polymerge.families.qwen2_vl import QWEN2_VL
from polymerge.families.rules import Family

QWEN2_5_VL = Family(
    "qwen2_5_vl",
    rules=QWEN2_VL.rules,
    model_types=("qwen2_5_vl",),
    architectures=("Qwen2_5_VLForConditionalGeneration",),
    decoders=("qwen2",),
    title="Qwen2.5-VL",
    source="Qwen/Qwen2.5-VL-7B-Instruct",
    mark="vision.blocks.{i}.mlp.gate_proj.weight",
)
