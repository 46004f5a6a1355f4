"""Vision-language models in their authors' own layouts, most of which transformers has no class for."""

from __future__ import annotations

from polymerge.families.rules import Family, Rule
from polymerge.families.tables.llama_like import (
    GATE_AND_UP,
    HEAD,
    PHI3,
    QUERIES_KEYS_VALUES,
    decoder,
    fused,
    internlm2_decoder,
)

_LAYER = "text.layers.{i}."

LLAVA_ORIGINAL = Family(
    "llava_original",
    rules=(
        *decoder("model."),
        HEAD,
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
"""LLaVA, and models built on its code: the decoder at the root, everything else inside it.

LLaVA 1.5, ShareGPT4V, Yi-VL and LLaVA-OneVision (lmms-lab) share the names; they differ in the decoder's lineage and in
whether the vision tower is stored at all. Names of LLaVA 1.5 from its published index, those of the vision tower from
the conversion scripts of transformers.
"""

CAMBRIAN = Family(
    "cambrian",
    rules=(
        *decoder("model."),
        HEAD,
        Rule("model.mm_projector.{rest}", "projector.{rest}"),
        Rule("model.mm_projector_aux_{rest}", "projector.aux_{rest}"),
        Rule("model.vision_sampler_{rest}", "projector.vision_sampler_{rest}"),
        Rule("model.vision_query", "projector.vision_query"),
        Rule("model.image_newline", "projector.image_newline"),
        Rule("model.vision_tower_aux_list.{rest}", "vision.{rest}"),
    ),
    model_types=("cambrian_llama",),
    architectures=("CambrianLlamaForCausalLM",),
    decoders=("llama",),
    title="Cambrian-1",
    source="nyu-visionx/cambrian-8b",
)
"""Names from the modules that its modelling code defines (cambrian_arch.py)."""

_BRANCHES = (("0", "text"), ("1", "image"))
_TWICE = ("input_layernorm", "post_attention_layernorm", "self_attn.k_proj", "self_attn.v_proj")

MPLUG_OWL2 = Family(
    "mplug_owl2",
    rules=(
        *(
            Rule(f"model.layers.{{i}}.{name}.multiway.{way}.{{rest}}", f"{_LAYER}{name}.{{rest}}@{branch}")
            for name in _TWICE
            for way, branch in _BRANCHES
        ),
        *decoder("model."),
        HEAD,
        Rule("model.vision_model.{rest}", "vision.{rest}"),
        Rule("model.visual_abstractor.{rest}", "projector.{rest}"),
    ),
    model_types=("mplug_owl2",),
    architectures=("MPLUGOwl2LlamaForCausalLM",),
    decoders=("llama",),
    title="mPLUG-Owl2",
    source="MAGAer13/mplug-owl2-llama2-7b",
)
"""A Llama with two sets of norms, keys and values: 0 for text tokens and 1 for image tokens.

Names as its own conversion script writes them.
"""


def _cogvlm_fused(theirs: str, kind: str, branch: str) -> Rule:
    """The rule of an expert's queries, keys and values; `kind` is weight or bias."""
    names = tuple(f"{_LAYER}{part}.{kind}@{branch}" for part in QUERIES_KEYS_VALUES)
    return Rule(f"model.layers.{{i}}.self_attn.{theirs}_expert_query_key_value.{kind}", names, split="qkv")


def _cogvlm_expert(theirs: str, branch: str) -> tuple[Rule, ...]:
    """The rules of one expert."""
    attention, mlp = f"model.layers.{{i}}.self_attn.{theirs}_expert_", f"model.layers.{{i}}.mlp.{theirs}_mlp."
    return (
        _cogvlm_fused(theirs, "weight", branch),
        Rule(attention + "dense.{rest}", f"{_LAYER}self_attn.o_proj.{{rest}}@{branch}"),
        Rule(mlp + "{rest}", f"{_LAYER}mlp.{{rest}}@{branch}"),
    )


COGVLM = Family(
    "cogvlm",
    rules=(
        *_cogvlm_expert("language", "text"),
        *_cogvlm_expert("vision", "image"),
        _cogvlm_fused("vision", "bias", "image"),
        Rule("model.layers.{i}.input_layernorm.{rest}", _LAYER + "input_layernorm.{rest}"),
        Rule("model.layers.{i}.post_attention_layernorm.{rest}", _LAYER + "post_attention_layernorm.{rest}"),
        Rule("model.embed_tokens.weight", "text.embed_tokens.weight"),
        Rule("model.norm.weight", "text.norm.weight"),
        HEAD,
        Rule("model.vision.linear_proj.{rest}", "projector.linear_proj.{rest}"),
        Rule("model.vision.{rest}", "vision.{rest}"),
    ),
    architectures=("CogVLMForCausalLM", "CogVLMVideoForCausalLM"),
    decoders=("llama",),
    title="CogVLM, CogVLM2",
    source="THUDM/cogvlm-chat-hf",
)
"""A Llama with two sets of attention and MLP: experts for text and for image tokens.

Names of the vision part from the index of CogVLM2's published checkpoint; those of the text tower are the same in both
generations, CogVLM2 has biases on the image tokens' queries, keys and values.
"""

INTERNVL_CHAT = Family(
    "internvl_chat",
    rules=(
        Rule("vision_model.{rest}", "vision.{rest}"),
        Rule("mlp1.{rest}", "projector.{rest}"),
        *internlm2_decoder("language_model.model."),
        *decoder("language_model.model."),
        Rule("language_model.lm_head.weight", "text.lm_head.weight"),
        Rule("language_model.output.weight", "text.lm_head.weight"),
    ),
    model_types=("internvl_chat",),
    architectures=("InternVLChatModel",),
    decoders=("llama", "qwen2", "internlm2"),
    title="InternVL 2, 2.5, 3 (as published)",
    source="OpenGVLab/InternVL2_5-8B",
    lineages={"internvl_chat": ""},
)

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
"""A MiniCPM, Llama 3 or Qwen2 decoder; names from the published indexes."""

PHI3_V = Family(
    "phi3_v",
    rules=(
        *PHI3.rules,
        Rule("model.vision_embed_tokens.img_processor.vision_model.{rest}", "vision.{rest}"),
        Rule("model.vision_embed_tokens.{rest}", "projector.{rest}"),
    ),
    model_types=("phi3_v",),
    architectures=("Phi3VForCausalLM",),
    decoders=("phi3",),
    title="Phi-3-Vision, Phi-3.5-Vision",
    source="microsoft/Phi-3.5-vision-instruct",
)
"""A Phi-3 at the root, all else under a name like an embedding's; names from the published index of Phi-3-Vision."""

DEEPSEEK_VL_ORIGINAL = Family(
    "deepseek_vl_original",
    rules=(
        *decoder("language_model.model."),
        Rule("language_model.lm_head.weight", "text.lm_head.weight"),
        Rule("aligner.{rest}", "projector.{rest}"),
        Rule("vision_model.{rest}", "vision.{rest}"),
    ),
    model_types=("multi_modality",),
    architectures=("MultiModalityCausalLM",),
    decoders=("llama",),
    title="DeepSeek-VL (its authors' layout)",
    source="deepseek-ai/deepseek-vl-7b-chat",
)
"""Names from what transformers' converter reads. Janus has the same model type and more towers, whose names no rule
here explains."""

_MOLMO_BLOCK = "model.transformer.blocks.{i}."

MOLMO = Family(
    "molmo",
    rules=(
        fused(_MOLMO_BLOCK + "att_proj", QUERIES_KEYS_VALUES, "qkv"),
        fused(_MOLMO_BLOCK + "ff_proj", GATE_AND_UP[::-1], "halves"),
        Rule(_MOLMO_BLOCK + "attn_out.{rest}", _LAYER + "self_attn.o_proj.{rest}"),
        Rule(_MOLMO_BLOCK + "ff_out.{rest}", _LAYER + "mlp.down_proj.{rest}"),
        Rule(_MOLMO_BLOCK + "attn_norm.{rest}", _LAYER + "input_layernorm.{rest}"),
        Rule(_MOLMO_BLOCK + "ff_norm.{rest}", _LAYER + "post_attention_layernorm.{rest}"),
        Rule("model.transformer.wte.embedding", "text.embed_tokens.weight"),
        # the tokens that stand for images
        Rule("model.transformer.wte.new_embedding", "projector.new_embedding"),
        Rule("model.transformer.ln_f.weight", "text.norm.weight"),
        Rule("model.transformer.ff_out.weight", "text.lm_head.weight"),
        Rule("model.vision_backbone.image_vit.{rest}", "vision.{rest}"),
        Rule("model.vision_backbone.{rest}", "projector.{rest}"),
    ),
    model_types=("molmo",),
    architectures=("MolmoForCausalLM",),
    decoders=("qwen2",),
    title="Molmo 7B-D, 72B",
    source="allenai/Molmo-7B-D-0924",
)
"""A Qwen2 under OLMo's names; from the index of a quantized copy of 7B-D.

What is fused in which order is the same in Molmo 2, whose conversion transformers has. Up comes before gate.
"""
