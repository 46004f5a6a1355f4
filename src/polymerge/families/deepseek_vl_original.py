"""DeepSeek-VL in its authors' layout; names from what transformers' converter reads.

Janus has the same model type and more towers, whose names no rule here explains.
"""

from __future__ import annotations

from polymerge.families.decoder import decoder
from polymerge.families.rules import Family, Rule

DEEPSEEK_VL_ORIGINAL = Family(
    "deepseek_vl_original",
    rules=(
        *decoder("language_model.model."),
        Rule("language_model.lm_head.weight", "text.lm_head.weight"),
        Rule("aligner.{rest}", "projector.{rest}"),
        Rule("vision_model.{rest}", "vision.{rest}"),
    ),
    model_types=("multi_modality",),
    architectures=("MultiModalityCausalLM",),
    decoders=("llama",),
    title="DeepSeek-VL (its authors' layout)",
    source="deepseek-ai/deepseek-vl-7b-chat",
)
