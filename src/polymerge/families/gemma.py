"""Gemma, under Llama's names; its head is its embedding."""

from __future__ import annotations

from polymerge.families.llama import LLAMA
from polymerge.families.rules import Family

GEMMA = Family(
    "gemma",
    rules=LLAMA.rules,
    model_types=("gemma",),
    architectures=("GemmaForCausalLM",),
    decoders=("gemma",),
    title="Gemma",
    source="google/gemma-2b",
    defaults={"num_hidden_layers": 28, "hidden_size": 3072, "vocab_size": 256000},
    ties=True,
)
