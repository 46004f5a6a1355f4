"""Vision-language models that transformers stores like LLaVA: a tower, a projector and a decoder."""

from __future__ import annotations

from collections.abc import Mapping

from polymerge.families.rules import Family, Rule
from polymerge.families.tables.llama_like import HEAD, decoder


def outer_names(towers: Mapping[str, str]) -> tuple[Rule, ...]:
    """The rules of a model with LLaVA's outer names: first those on disk, then those of transformers 5 in memory.

    towers   the prefix of each tower's names, and its part, such as `{"vision_tower": "vision"}`
    """
    beside = {"multi_modal_projector": "projector", **towers}
    return (
        *decoder("language_model.model."),
        Rule("language_model.lm_head.weight", "text.lm_head.weight"),
        *(Rule(f"{name}.{{rest}}", f"{part}.{{rest}}") for name, part in beside.items()),
        *decoder("model.language_model."),
        HEAD,
        *(Rule(f"model.{name}.{{rest}}", f"{part}.{{rest}}") for name, part in beside.items()),
    )


OUTER_PUBLISHED = (
    Rule("model.language_model.{rest}", "language_model.model.{rest}"),
    Rule("lm_head.{rest}", "language_model.lm_head.{rest}"),
    Rule("model.{rest}", "{rest}"),
)
"""From LLaVA's outer names in memory to those on disk."""

LLAVA = Family(
    "llava",
    rules=outer_names({"vision_tower.vision_model": "vision", "vision_tower": "vision"}),
    model_types=("llava",),
    architectures=("LlavaForConditionalGeneration",),
    decoders=("llama", "mistral", "qwen2"),
    title="LLaVA 1.5, Pixtral (transformers layout)",
    source="llava-hf/llava-1.5-7b-hf",
    published=OUTER_PUBLISHED,
    boxed="vision_tower.vision_model.",
)
"""A CLIP-like tower and a two-layer projector; Pixtral has its own tower and a Mistral decoder."""

LLAVA_NEXT = Family(
    "llava_next",
    rules=(
        *LLAVA.rules,
        # the vector that ends a row of image patches
        Rule("image_newline", "projector.image_newline"),
        Rule("model.image_newline", "projector.image_newline"),
    ),
    model_types=("llava_next", "llava_next_video"),
    architectures=("LlavaNextForConditionalGeneration", "LlavaNextVideoForConditionalGeneration"),
    decoders=("llama", "mistral", "qwen2"),
    title="LLaVA-NeXT (1.6), image and video",
    source="llava-hf/llama3-llava-next-8b-hf",
    published=OUTER_PUBLISHED,
    boxed="vision_tower.vision_model.",
)

LLAVA_ONEVISION = Family(
    "llava_onevision",
    rules=LLAVA_NEXT.rules,
    model_types=("llava_onevision",),
    architectures=("LlavaOnevisionForConditionalGeneration",),
    decoders=("qwen2",),
    title="LLaVA-OneVision (transformers layout)",
    source="llava-hf/llava-onevision-qwen2-7b-ov-hf",
    published=OUTER_PUBLISHED,
    boxed="vision_tower.vision_model.",
)
"""A SigLIP tower and a Qwen2 decoder."""

PALIGEMMA = Family(
    "paligemma",
    rules=LLAVA.rules,
    model_types=("paligemma",),
    architectures=("PaliGemmaForConditionalGeneration",),
    decoders=("gemma", "gemma2"),
    title="PaliGemma, PaliGemma 2",
    source="google/paligemma-3b-pt-224",
    ties=True,
    published=OUTER_PUBLISHED,
    boxed="vision_tower.vision_model.",
)

GEMMA3 = Family(
    "gemma3",
    rules=LLAVA.rules,
    model_types=("gemma3",),
    architectures=("Gemma3ForConditionalGeneration",),
    decoders=("gemma3_text",),
    title="Gemma 3",
    source="google/gemma-3-4b-it",
    ties=True,
    published=OUTER_PUBLISHED,
    boxed="vision_tower.vision_model.",
)

INTERNVL = Family(
    "internvl",
    rules=outer_names({"vision_tower": "vision"}),
    model_types=("internvl",),
    architectures=("InternVLForConditionalGeneration",),
    decoders=("qwen2", "llama"),
    title="InternVL 2.5, 3 (transformers layout)",
    source="OpenGVLab/InternVL3-8B-hf",
    published=OUTER_PUBLISHED,
)

MISTRAL3 = Family(
    "mistral3",
    rules=INTERNVL.rules,
    model_types=("mistral3",),
    architectures=("Mistral3ForConditionalGeneration",),
    decoders=("mistral",),
    title="Mistral Small 3.1, 3.2 (transformers layout)",
    source="mistralai/Mistral-Small-3.1-24B-Instruct-2503",
    published=OUTER_PUBLISHED,
)
"""A Pixtral tower and a Mistral. In Mistral's own `consolidated.safetensors` more than names differ: queries and keys
have their rows in another order."""

QWEN2_AUDIO = Family(
    "qwen2_audio",
    rules=outer_names({"audio_tower": "audio"}),
    model_types=("qwen2_audio",),
    architectures=("Qwen2AudioForConditionalGeneration",),
    decoders=("qwen2",),
    title="Qwen2-Audio",
    source="Qwen/Qwen2-Audio-7B-Instruct",
    published=OUTER_PUBLISHED,
)

MLLAMA = Family(
    "mllama",
    rules=outer_names({"vision_model": "vision"}),
    model_types=("mllama",),
    architectures=("MllamaForConditionalGeneration",),
    decoders=("llama",),
    title="Llama 3.2 Vision",
    source="meta-llama/Llama-3.2-11B-Vision-Instruct",
    defaults={
        "num_hidden_layers": 40,
        "vocab_size": 128256,
        "cross_attention_layers": (3, 8, 13, 18, 23, 28, 33, 38),
    },
    interleaved="cross_attention_layers",
    published=OUTER_PUBLISHED,
)
"""A Llama 3.1 with cross-attention layers in between. The config lists those, which are part of the projector
(`projector.cross_layers`); the others are numbered without them, as in the language model.
"""

IDEFICS2 = Family(
    "idefics2",
    rules=(
        *decoder("model.text_model."),
        HEAD,
        Rule("model.connector.{rest}", "projector.{rest}"),
        Rule("model.vision_model.{rest}", "vision.{rest}"),
    ),
    model_types=("idefics2",),
    architectures=("Idefics2ForConditionalGeneration",),
    decoders=("mistral",),
    title="Idefics2",
    source="HuggingFaceM4/idefics2-8b",
)
"""A Mistral decoder, and a perceiver that reduces an image to a few tokens."""

IDEFICS3 = Family(
    "idefics3",
    rules=IDEFICS2.rules,
    model_types=("idefics3", "smolvlm"),
    architectures=("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"),
    decoders=("llama",),
    title="Idefics3, SmolVLM, SmolVLM2",
    source="HuggingFaceTB/SmolVLM-Instruct",
)

DEEPSEEK_VL = Family(
    "deepseek_vl",
    rules=(
        *decoder("model.language_model."),
        HEAD,
        Rule("model.aligner.{rest}", "projector.{rest}"),
        Rule("model.vision_model.vision_model.{rest}", "vision.{rest}"),
        Rule("model.vision_model.{rest}", "vision.{rest}"),
        Rule("model.high_res_vision_model.{rest}", "vision.high_res_vision_model.{rest}"),
        Rule("model.high_res_vision_{rest}", "projector.high_res_vision_{rest}"),
    ),
    model_types=("deepseek_vl", "deepseek_vl_hybrid"),
    architectures=("DeepseekVLForConditionalGeneration", "DeepseekVLHybridForConditionalGeneration"),
    decoders=("llama",),
    title="DeepSeek-VL (transformers layout)",
    source="deepseek-community/deepseek-vl-7b-chat",
    boxed="model.vision_model.vision_model.",
)
"""One vision tower, optionally with a second one of high resolution, which a neck joins to the first."""
