"""Qwen2-VL: the decoder sits where a plain Qwen2 has it, the vision tower beside it."""

from __future__ import annotations

from polymerge.families.decoder import decoder
from polymerge.families.rules import Family, Rule

QWEN2_VL = Family(
    "qwen2_vl",
    rules=(
        Rule("visual.merger.{rest}", "projector.{rest}"),
        Rule("visual.{rest}", "vision.{rest}"),
        *decoder("model."),
        Rule("lm_head.weight", "text.lm_head.weight"),
        # what transformers 5 calls them in memory
        Rule("model.visual.merger.{rest}", "projector.{rest}"),
        Rule("model.visual.{rest}", "vision.{rest}"),
        *decoder("model.language_model."),
    ),
    model_types=("qwen2_vl",),
    architectures=("Qwen2VLForConditionalGeneration",),
    decoders=("qwen2",),
    title="Qwen2-VL",
    source="Qwen/Qwen2-VL-7B-Instruct",
    mark="vision.blocks.{i}.mlp.fc1.weight",
)
