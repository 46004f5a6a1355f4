"""Mistral, under Llama's names."""

from __future__ import annotations

from polymerge.families.llama import LLAMA
from polymerge.mapping import Family

MISTRAL = Family(
    "mistral",
    rules=LLAMA.rules,
    model_types=("mistral",),
    architectures=("MistralForCausalLM",),
    decoders=("mistral",),
    title="Mistral",
    source="mistralai/Mistral-7B-v0.1",
)
