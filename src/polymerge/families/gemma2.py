"""Gemma 2, under Llama's names, with norms before and after the MLP."""

from __future__ import annotations

from polymerge.families.llama import LLAMA
from polymerge.families.rules import Family

GEMMA2 = Family(
    "gemma2",
    rules=LLAMA.rules,
    model_types=("gemma2",),
    architectures=("Gemma2ForCausalLM",),
    decoders=("gemma2",),
    title="Gemma 2",
    source="google/gemma-2-9b",
    defaults={"num_hidden_layers": 26, "hidden_size": 2304, "vocab_size": 256000},
    ties=True,
)
