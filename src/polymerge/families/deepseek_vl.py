"""DeepSeek-VL in transformers' layout, with one vision tower or with a second one of high resolution."""

from __future__ import annotations

from polymerge.families.decoder import decoder
from polymerge.families.rules import Family, Rule

DEEPSEEK_VL = Family(
    "deepseek_vl",
    rules=(
        *decoder("model.language_model."),
        Rule("lm_head.weight", "text.lm_head.weight"),
        Rule("model.aligner.{rest}", "projector.{rest}"),
        Rule("model.vision_model.{rest}", "vision.{rest}"),
        Rule("model.high_res_vision_{rest}", "vision.high_res_vision_{rest}"),
    ),
    model_types=("deepseek_vl", "deepseek_vl_hybrid"),
    architectures=("DeepseekVLForConditionalGeneration", "DeepseekVLHybridForConditionalGeneration"),
    decoders=("llama",),
    title="DeepSeek-VL (transformers layout)",
    source="deepseek-community/deepseek-vl-7b-chat",
)
