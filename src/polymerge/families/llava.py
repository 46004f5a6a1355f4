"""LLaVA 1.5 as transformers stores it: a CLIP-like tower, a two-layer projector, a Llama-like decoder.

Pixtral is stored as one too, with a tower of its own and a Mistral.
"""

from __future__ import annotations

from polymerge.families.decoder import decoder
from polymerge.families.rules import Family, Rule

LLAVA = Family(
    "llava",
    rules=(
        *decoder("language_model.model."),
        Rule("language_model.lm_head.weight", "text.lm_head.weight"),
        Rule("multi_modal_projector.{rest}", "projector.{rest}"),
        Rule("vision_tower.vision_model.{rest}", "vision.{rest}"),
        Rule("vision_tower.{rest}", "vision.{rest}"),
        # what transformers 5 calls them in memory
        *decoder("model.language_model."),
        Rule("lm_head.weight", "text.lm_head.weight"),
        Rule("model.multi_modal_projector.{rest}", "projector.{rest}"),
        Rule("model.vision_tower.vision_model.{rest}", "vision.{rest}"),
        Rule("model.vision_tower.{rest}", "vision.{rest}"),
    ),
    model_types=("llava",),
    architectures=("LlavaForConditionalGeneration",),
    decoders=("llama", "mistral", "qwen2"),
    title="LLaVA 1.5, Pixtral (transformers layout)",
    source="llava-hf/llava-1.5-7b-hf",
)
