"""PaliGemma and PaliGemma 2: LLaVA's outer names, a SigLIP tower, a Gemma or Gemma 2."""

from __future__ import annotations

from polymerge.families.llava import LLAVA
from polymerge.families.rules import Family

PALIGEMMA = Family(
    "paligemma",
    rules=LLAVA.rules,
    model_types=("paligemma",),
    architectures=("PaliGemmaForConditionalGeneration",),
    decoders=("gemma", "gemma2"),
    title="PaliGemma, PaliGemma 2",
    source="google/paligemma-3b-pt-224",
    ties=True,
)
