"""InternVL as transformers stores it, with LLaVA's outer names."""

from __future__ import annotations

from polymerge.families.decoder import decoder
from polymerge.families.rules import Family, Rule

INTERNVL = Family(
    "internvl",
    rules=(
        *decoder("language_model.model."),
        Rule("language_model.lm_head.weight", "text.lm_head.weight"),
        Rule("multi_modal_projector.{rest}", "projector.{rest}"),
        Rule("vision_tower.{rest}", "vision.{rest}"),
        # what transformers 5 calls them in memory
        *decoder("model.language_model."),
        Rule("lm_head.weight", "text.lm_head.weight"),
        Rule("model.multi_modal_projector.{rest}", "projector.{rest}"),
        Rule("model.vision_tower.{rest}", "vision.{rest}"),
    ),
    model_types=("internvl",),
    architectures=("InternVLForConditionalGeneration",),
    decoders=("qwen2", "llama"),
    title="InternVL 2.5, 3 (transformers layout)",
    source="OpenGVLab/InternVL3-8B-hf",
)
