"""Mixtral: Mistral with experts, one by one on disk under names of its own.

transformers 5 calls the router `mlp.gate` in memory, and has all experts of a layer in one tensor; files that were
written like that are known too.
"""

from __future__ import annotations

from polymerge.families.llama import LLAMA
from polymerge.families.rules import Family, Rule

_MOE = "model.layers.{i}.block_sparse_moe."
_EXPERT = "text.layers.{i}.mlp.experts.{e}."

MIXTRAL = Family(
    "mixtral",
    rules=(
        Rule(_MOE + "experts.{e}.w1.weight", _EXPERT + "gate_proj.weight"),
        Rule(_MOE + "experts.{e}.w2.weight", _EXPERT + "down_proj.weight"),
        Rule(_MOE + "experts.{e}.w3.weight", _EXPERT + "up_proj.weight"),
        Rule(_MOE + "gate.weight", "text.layers.{i}.mlp.gate.weight"),
        *LLAMA.rules,
    ),
    model_types=("mixtral",),
    architectures=("MixtralForCausalLM",),
    decoders=("mixtral",),
    title="Mixtral",
    source="mistralai/Mixtral-8x7B-v0.1",
    defaults={"num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 32000},
)
