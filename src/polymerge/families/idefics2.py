"""Idefics2, and its successors Idefics3 and SmolVLM, which differ inside the connector only."""

from __future__ import annotations

from polymerge.families.decoder import decoder
from polymerge.mapping import Family, Rule

IDEFICS2 = Family(
    "idefics2",
    rules=(
        *decoder("model.text_model."),
        Rule("lm_head.weight", "text.lm_head.weight"),
        Rule("model.connector.{rest}", "projector.{rest}"),
        Rule("model.vision_model.{rest}", "vision.{rest}"),
    ),
    model_types=("idefics2", "idefics3", "smolvlm"),
    architectures=(
        "Idefics2ForConditionalGeneration",
        "Idefics3ForConditionalGeneration",
        "SmolVLMForConditionalGeneration",
    ),
    decoders=("mistral", "llama"),
    title="Idefics2, Idefics3, SmolVLM",
    source="HuggingFaceM4/idefics2-8b",
)
