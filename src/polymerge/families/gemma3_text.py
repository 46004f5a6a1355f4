"""Gemma 3 without eyes, and the text tower of those with: Gemma 2's names with norms of queries and keys."""

from __future__ import annotations

from polymerge.families.llama import LLAMA
from polymerge.families.rules import Family

GEMMA3_TEXT = Family(
    "gemma3_text",
    rules=LLAMA.rules,
    model_types=("gemma3_text",),
    architectures=("Gemma3ForCausalLM",),
    decoders=("gemma3_text",),
    title="Gemma 3 (text)",
    source="google/gemma-3-1b-it",
    defaults={"num_hidden_layers": 26, "hidden_size": 2304, "vocab_size": 262208},
    ties=True,
)
