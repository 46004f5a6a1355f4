"""CogVLM and CogVLM2: a Llama whose attention and MLP come twice, as experts for text and for image tokens.

The names of the vision part are in the index of CogVLM2's published checkpoint; those of the text tower are the same in
both generations, CogVLM2 has biases on the image tokens' queries, keys and values.
"""

from __future__ import annotations

from polymerge.mapping import Family, Rule

_LAYER = "text.layers.{i}."


def _expert(theirs: str, branch: str) -> tuple[Rule, ...]:
    """The rules of one expert."""
    attention, ours = f"model.layers.{{i}}.self_attn.{theirs}_expert_", _LAYER + "self_attn."
    fused = tuple(f"{ours}{part}_proj." for part in "qkv")
    return (
        Rule(attention + "query_key_value.weight", tuple(f"{name}weight@{branch}" for name in fused), split="qkv"),
        Rule(attention + "query_key_value.bias", tuple(f"{name}bias@{branch}" for name in fused), split="qkv"),
        Rule(attention + "dense.{rest}", f"{ours}o_proj.{{rest}}@{branch}"),
        Rule(f"model.layers.{{i}}.mlp.{theirs}_mlp.{{rest}}", f"{_LAYER}mlp.{{rest}}@{branch}"),
    )


COGVLM = Family(
    "cogvlm",
    rules=(
        *_expert("language", "text"),
        *_expert("vision", "image"),
        Rule("model.layers.{i}.input_layernorm.{rest}", _LAYER + "input_layernorm.{rest}"),
        Rule("model.layers.{i}.post_attention_layernorm.{rest}", _LAYER + "post_attention_layernorm.{rest}"),
        Rule("model.embed_tokens.weight", "text.embed_tokens.weight"),
        Rule("model.norm.weight", "text.norm.weight"),
        Rule("lm_head.weight", "text.lm_head.weight"),
        Rule("model.vision.linear_proj.{rest}", "projector.linear_proj.{rest}"),
        Rule("model.vision.{rest}", "vision.{rest}"),
    ),
    architectures=("CogVLMForCausalLM", "CogVLMVideoForCausalLM"),
    decoders=("llama",),
    title="CogVLM, CogVLM2",
    source="THUDM/cogvlm-chat-hf",
)
