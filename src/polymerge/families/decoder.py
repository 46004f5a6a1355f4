"""The names inside a Llama-like decoder, which most text towers share, and the ways to fuse some of its tensors."""

from __future__ import annotations

from polymerge.families.rules import Rule

__all__ = ["GATE_AND_UP", "QUERIES_KEYS_VALUES", "decoder", "fused", "internlm2_decoder"]

QUERIES_KEYS_VALUES = tuple(f"self_attn.{part}_proj" for part in "qkv")
GATE_AND_UP = ("mlp.gate_proj", "mlp.up_proj")


def decoder(prefix: str) -> tuple[Rule, ...]:
    """The rules of a decoder whose embedding, layers and final norm are stored under `prefix`; its head is elsewhere.

    They name what belongs to the decoder instead of taking all of `<prefix>*`, so that a tower of another kind that
    someone stored there is an error and not a piece of text.
    """
    return (
        Rule(prefix + "embed_tokens.weight", "text.embed_tokens.weight"),
        *_experts_in_one(prefix),
        Rule(prefix + "layers.{i}.{rest}", "text.layers.{i}.{rest}"),
        Rule(prefix + "norm.weight", "text.norm.weight"),
    )


def fused(pattern: str, parts: tuple[str, ...], split: str) -> Rule:
    """The rule of a tensor of a layer that holds several parts of a plain decoder one below the other."""
    return Rule(f"{pattern}.{{rest}}", tuple(f"text.layers.{{i}}.{part}.{{rest}}" for part in parts), split=split)


def _experts_in_one(prefix: str) -> tuple[Rule, ...]:
    """The rules of a decoder that has all experts of a layer in one tensor, which transformers 5 does in memory."""
    layer, expert = prefix + "layers.{i}.mlp.experts.", "text.layers.{i}.mlp.experts.{e}."
    return (
        Rule(layer + "gate_up_proj", (expert + "gate_proj.weight", expert + "up_proj.weight"), split="experts_in"),
        Rule(layer + "down_proj", expert + "down_proj.weight", split="experts_out"),
    )


def internlm2_decoder(prefix: str) -> tuple[Rule, ...]:
    """The rules of a decoder under InternLM2's names: a Llama whose queries, keys and values are fused head by head."""
    layer = prefix + "layers.{i}."
    names = {
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    return (
        Rule(prefix + "tok_embeddings.weight", "text.embed_tokens.weight"),
        fused(layer + "attention.wqkv", QUERIES_KEYS_VALUES, "wqkv"),
        *(Rule(f"{layer}{ours}.{{rest}}", f"text.layers.{{i}}.{plain}.{{rest}}") for ours, plain in names.items()),
    )
