"""Qwen2 and Qwen2.5, under Llama's names; q, k and v have biases."""

from __future__ import annotations

from polymerge.families.llama import LLAMA
from polymerge.families.rules import Family

QWEN2 = Family(
    "qwen2",
    rules=LLAMA.rules,
    model_types=("qwen2",),
    architectures=("Qwen2ForCausalLM",),
    decoders=("qwen2",),
    title="Qwen2, Qwen2.5",
    source="Qwen/Qwen2-7B",
    defaults={"num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 151936},
)
