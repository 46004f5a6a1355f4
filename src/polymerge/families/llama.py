"""Llama 2 and 3, and every language model that is stored under their names."""

from __future__ import annotations

from polymerge.families.decoder import decoder
from polymerge.families.rules import Family, Rule

LLAMA = Family(
    "llama",
    rules=(
        *decoder("model."),
        Rule("lm_head.weight", "text.lm_head.weight"),
    ),
    model_types=("llama",),
    architectures=("LlamaForCausalLM",),
    decoders=("llama",),
    title="Llama",
    source="meta-llama/Meta-Llama-3-8B",
    defaults={"num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 32000},
)
