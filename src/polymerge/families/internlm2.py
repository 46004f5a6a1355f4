"""InternLM2 and 2.5; names from a published index, how heads lie in `wqkv` from transformers' converter of InternVL."""

from __future__ import annotations

from polymerge.families.decoder import internlm2_decoder
from polymerge.families.rules import Family, Rule

INTERNLM2 = Family(
    "internlm2",
    rules=(
        *internlm2_decoder("model."),
        Rule("model.norm.weight", "text.norm.weight"),
        Rule("output.weight", "text.lm_head.weight"),
    ),
    model_types=("internlm2",),
    architectures=("InternLM2ForCausalLM",),
    decoders=("internlm2",),
    title="InternLM2, InternLM2.5",
    source="internlm/internlm2_5-7b-chat",
)
