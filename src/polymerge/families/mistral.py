"""Mistral, under Llama's names."""

from __future__ import annotations

from polymerge.families.llama import LLAMA
from polymerge.families.rules import Family

MISTRAL = Family(
    "mistral",
    rules=LLAMA.rules,
    model_types=("mistral",),
    architectures=("MistralForCausalLM",),
    decoders=("mistral",),
    title="Mistral",
    source="mistralai/Mistral-7B-v0.1",
    defaults={"num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 32000},
)
