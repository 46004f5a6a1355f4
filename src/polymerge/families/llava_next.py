"""LLaVA-NeXT: LLaVA's names and one vector that ends a row of image patches."""

from __future__ import annotations

from polymerge.families.llava import LLAVA
from polymerge.families.rules import Family, Rule

LLAVA_NEXT = Family(
    "llava_next",
    rules=(
        *LLAVA.rules,
        Rule("image_newline", "projector.image_newline"),
        Rule("model.image_newline", "projector.image_newline"),
    ),
    model_types=("llava_next", "llava_next_video"),
    architectures=("LlavaNextForConditionalGeneration", "LlavaNextVideoForConditionalGeneration"),
    decoders=("llama", "mistral", "qwen2"),
    title="LLaVA-NeXT (1.6), image and video",
    source="llava-hf/llama3-llava-next-8b-hf",
)
