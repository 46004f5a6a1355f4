"""CogVLM and CogVLM2: a Llama whose attention and MLP come twice, as experts for text and for image tokens.

The names of the vision part are in the index of CogVLM2's published checkpoint; those of the text tower are the same in
both generations, CogVLM2 has biases on the image tokens' queries, keys and values.
"""

from __future__ import annotations

from polymerge.families.rules import Family, Rule

_LAYER = "text.layers.{i}."


def _fused(theirs: str, kind: str, branch: str) -> Rule:
    """The rule of an expert's queries, keys and values; `kind` is weight or bias."""
    names = tuple(f"{_LAYER}self_attn.{part}_proj.{kind}@{branch}" for part in "qkv")
    return Rule(f"model.layers.{{i}}.self_attn.{theirs}_expert_query_key_value.{kind}", names, split="qkv")


def _expert(theirs: str, branch: str) -> tuple[Rule, ...]:
    """The rules of one expert."""
    return (
        _fused(theirs, "weight", branch),
        Rule(
            f"model.layers.{{i}}.self_attn.{theirs}_expert_dense.{{rest}}",
            f"{_LAYER}self_attn.o_proj.{{rest}}@{branch}",
        ),
        Rule(f"model.layers.{{i}}.mlp.{theirs}_mlp.{{rest}}", f"{_LAYER}mlp.{{rest}}@{branch}"),
    )


COGVLM = Family(
    "cogvlm",
    rules=(
        *_expert("language", "text"),
        *_expert("vision", "image"),
        _fused("vision", "bias", "image"),
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
