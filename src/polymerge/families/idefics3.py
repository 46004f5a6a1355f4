"""Idefics3 and SmolVLM: Idefics2's outer names, a Llama and another connector inside."""

from __future__ import annotations

from polymerge.families.idefics2 import IDEFICS2
from polymerge.families.rules import Family

IDEFICS3 = Family(
    "idefics3",
    rules=IDEFICS2.rules,
    model_types=("idefics3", "smolvlm"),
    architectures=("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"),
    decoders=("llama",),
    title="Idefics3, SmolVLM, SmolVLM2",
    source="HuggingFaceTB/SmolVLM-Instruct",
)
