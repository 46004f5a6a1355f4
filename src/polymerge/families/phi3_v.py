"""Phi-3-Vision and Phi-3.5-Vision: a Phi-3 at the root, all else under a name that looks like an embedding's.

Names from the published index of Phi-3-Vision.
"""

from __future__ import annotations

from polymerge.families.phi3 import PHI3
from polymerge.families.rules import Family, Rule

PHI3_V = Family(
    "phi3_v",
    rules=(
        *PHI3.rules,
        Rule("model.vision_embed_tokens.img_processor.vision_model.{rest}", "vision.{rest}"),
        Rule("model.vision_embed_tokens.{rest}", "projector.{rest}"),
    ),
    model_types=("phi3_v",),
    architectures=("Phi3VForCausalLM",),
    decoders=("phi3",),
    title="Phi-3-Vision, Phi-3.5-Vision",
    source="microsoft/Phi-3.5-vision-instruct",
)
