"""Idefics2: a Mistral, and a perceiver that makes a few tokens of an image."""

from __future__ import annotations

from polymerge.families.decoder import decoder
from polymerge.families.rules import Family, Rule

IDEFICS2 = Family(
    "idefics2",
    rules=(
        *decoder("model.text_model."),
        Rule("lm_head.weight", "text.lm_head.weight"),
        Rule("model.connector.{rest}", "projector.{rest}"),
        Rule("model.vision_model.{rest}", "vision.{rest}"),
    ),
    model_types=("idefics2",),
    architectures=("Idefics2ForConditionalGeneration",),
    decoders=("mistral",),
    title="Idefics2",
    source="HuggingFaceM4/idefics2-8b",
)
