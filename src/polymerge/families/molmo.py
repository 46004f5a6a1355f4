"""Molmo 7B-D and 72B: a Qwen2 under OLMo's names; from the index of a quantized copy of 7B-D.

What is fused in which order is the same in Molmo 2, whose conversion transformers has. Up comes before gate.
"""

from __future__ import annotations

from polymerge.families.decoder import GATE_AND_UP, QUERIES_KEYS_VALUES, fused
from polymerge.families.rules import Family, Rule

_BLOCK, _LAYER = "model.transformer.blocks.{i}.", "text.layers.{i}."

MOLMO = Family(
    "molmo",
    rules=(
        fused(_BLOCK + "att_proj", QUERIES_KEYS_VALUES, "qkv"),
        fused(_BLOCK + "ff_proj", GATE_AND_UP[::-1], "halves"),
        Rule(_BLOCK + "attn_out.{rest}", _LAYER + "self_attn.o_proj.{rest}"),
        Rule(_BLOCK + "ff_out.{rest}", _LAYER + "mlp.down_proj.{rest}"),
        Rule(_BLOCK + "attn_norm.{rest}", _LAYER + "input_layernorm.{rest}"),
        Rule(_BLOCK + "ff_norm.{rest}", _LAYER + "post_attention_layernorm.{rest}"),
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
