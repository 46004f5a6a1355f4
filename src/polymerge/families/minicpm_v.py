"""MiniCPM-V 2, 2.5 and 2.6: a MiniCPM, Llama 3 or Qwen2 decoder under `llm.`; names from the published indexes."""

from __future__ import annotations

from polymerge.families.decoder import decoder
from polymerge.families.rules import Family, Rule

MINICPM_V = Family(
    "minicpm_v",
    rules=(
        *decoder("llm.model."),
        Rule("llm.lm_head.weight", "text.lm_head.weight"),
        Rule("vpm.{rest}", "vision.{rest}"),
        Rule("resampler.{rest}", "projector.{rest}"),
    ),
    model_types=("minicpmv",),
    architectures=("MiniCPMV",),
    decoders=("minicpm", "llama", "qwen2"),
    title="MiniCPM-V 2, 2.5, 2.6",
    source="openbmb/MiniCPM-V-2_6",
    lineages={"minicpmv": "", "MiniCPMV": ""},
)
