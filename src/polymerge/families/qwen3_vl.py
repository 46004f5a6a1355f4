"""Qwen3-VL: names on disk are those in memory; the vision tower feeds three more projectors from its middle layers."""

from __future__ import annotations

from polymerge.families.decoder import decoder
from polymerge.families.rules import Family, Rule

QWEN3_VL = Family(
    "qwen3_vl",
    rules=(
        Rule("model.visual.merger.{rest}", "projector.{rest}"),
        Rule("model.visual.deepstack_merger_list.{rest}", "projector.deepstack_merger_list.{rest}"),
        Rule("model.visual.{rest}", "vision.{rest}"),
        *decoder("model.language_model."),
        Rule("lm_head.weight", "text.lm_head.weight"),
    ),
    model_types=("qwen3_vl",),
    architectures=("Qwen3VLForConditionalGeneration",),
    decoders=("qwen3",),
    title="Qwen3-VL",
    source="Qwen/Qwen3-VL-8B-Instruct",
    mark="vision.blocks.{i}.mlp.linear_fc1.weight",
)
