"""LLaVA in the layout of its authors, and what was built on their code: the decoder at the root, everything else in it.

LLaVA 1.5, ShareGPT4V, Yi-VL and LLaVA-OneVision (lmms-lab) share the names; they differ in the decoder's lineage and in
whether the vision tower is stored at all. Names of LLaVA 1.5 from its published index, those of the vision tower from
the conversion scripts of transformers.
"""

from __future__ import annotations

from polymerge.families.decoder import decoder
from polymerge.families.rules import Family, Rule

LLAVA_ORIGINAL = Family(
    "llava_original",
    rules=(
        *decoder("model."),
        Rule("lm_head.weight", "text.lm_head.weight"),
        # two layers, as transformers' LLaVA calls them; another kind of projector keeps its own names
        Rule("model.mm_projector.0.{rest}", "projector.linear_1.{rest}"),
        Rule("model.mm_projector.2.{rest}", "projector.linear_2.{rest}"),
        Rule("model.mm_projector.{rest}", "projector.{rest}"),
        Rule("model.image_newline", "projector.image_newline"),
        Rule("model.vision_tower.vision_tower.vision_model.{rest}", "vision.{rest}"),
        Rule("model.vision_tower.vision_tower.{rest}", "vision.{rest}"),
    ),
    model_types=("llava_llama", "llava_qwen", "llava_mistral", "share4v"),
    architectures=(
        "LlavaLlamaForCausalLM",
        "LlavaQwenForCausalLM",
        "LlavaMistralForCausalLM",
        "Share4VLlamaForCausalLM",
    ),
    decoders=("llama", "mistral", "qwen2"),
    title="LLaVA 1.5, ShareGPT4V, Yi-VL, LLaVA-OneVision (their authors' layout)",
    source="liuhaotian/llava-v1.5-7b",
    lineages={
        "llava_mistral": "mistral",
        "llava_qwen": "qwen2",
        "LlavaMistralForCausalLM": "mistral",
        "LlavaQwenForCausalLM": "qwen2",
    },
)
