"""Qwen3, under Llama's names; queries and keys have norms."""

from __future__ import annotations

from polymerge.families.llama import LLAMA
from polymerge.families.rules import Family

QWEN3 = Family(
    "qwen3",
    rules=LLAMA.rules,
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM",),
    decoders=("qwen3",),
    title="Qwen3",
    source="Qwen/Qwen3-8B",
    defaults={"num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 151936},
)
