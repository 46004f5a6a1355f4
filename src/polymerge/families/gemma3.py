"""Gemma 3 with eyes: LLaVA's outer names, a SigLIP tower, a Gemma 3."""

from __future__ import annotations

from polymerge.families.llava import LLAVA
from polymerge.families.rules import Family

GEMMA3 = Family(
    "gemma3",
    rules=LLAVA.rules,
    model_types=("gemma3",),
    architectures=("Gemma3ForConditionalGeneration",),
    decoders=("gemma3_text",),
    title="Gemma 3",
    source="google/gemma-3-4b-it",
    ties=True,
)
