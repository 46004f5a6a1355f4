"""LLaVA-OneVision: LLaVA-NeXT's names with a SigLIP tower and a Qwen2 decoder."""

from __future__ import annotations

from polymerge.families.llava_next import LLAVA_NEXT
from polymerge.families.rules import Family

LLAVA_ONEVISION = Family(
    "llava_onevision",
    rules=LLAVA_NEXT.rules,
    model_types=("llava_onevision",),
    architectures=("LlavaOnevisionForConditionalGeneration",),
    decoders=("qwen2",),
    title="LLaVA-OneVision (transformers layout)",
    source="llava-hf/llava-onevision-qwen2-7b-ov-hf",
)
