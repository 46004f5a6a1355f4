"""Phi-3: Llama's names, but queries, keys and values are one tensor, and gate and up another."""

from __future__ import annotations

from polymerge.families.decoder import GATE_AND_UP, QUERIES_KEYS_VALUES, fused
from polymerge.families.llama import LLAMA
from polymerge.families.rules import Family

PHI3 = Family(
    "phi3",
    rules=(
        fused("model.layers.{i}.self_attn.qkv_proj", QUERIES_KEYS_VALUES, "qkv"),
        fused("model.layers.{i}.mlp.gate_up_proj", GATE_AND_UP, "gate_up"),
        *LLAMA.rules,
    ),
    model_types=("phi3",),
    architectures=("Phi3ForCausalLM",),
    decoders=("phi3",),
    title="Phi-3, Phi-3.5",
    source="microsoft/Phi-3-mini-4k-instruct",
    defaults={"num_hidden_layers": 32, "hidden_size": 3072, "vocab_size": 32064},
)
