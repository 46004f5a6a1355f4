"""Qwen3 with experts: one by one on disk, `mlp.experts.0.gate_proj.weight`.

transformers 5 has all experts of a layer in one tensor in memory, `mlp.experts.gate_up_proj`; files that were written
like that are known too.
"""

from __future__ import annotations

from polymerge.families.llama import LLAMA
from polymerge.families.rules import Family

QWEN3_MOE = Family(
    "qwen3_moe",
    rules=LLAMA.rules,
    model_types=("qwen3_moe",),
    architectures=("Qwen3MoeForCausalLM",),
    decoders=("qwen3_moe",),
    title="Qwen3 (experts)",
    source="Qwen/Qwen3-30B-A3B",
    defaults={"num_hidden_layers": 24, "hidden_size": 2048, "vocab_size": 151936},
)
