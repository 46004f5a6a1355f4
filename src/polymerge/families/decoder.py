"""The names inside a Llama-like decoder, which most text towers share."""

from __future__ import annotations

from polymerge.mapping import Rule

__all__ = ["decoder"]


def decoder(prefix: str) -> tuple[Rule, ...]:
    """The rules of a decoder whose embedding, layers and final norm are stored under `prefix`; its head is elsewhere.

    They name what belongs to the decoder instead of taking all of `<prefix>*`, so that a tower of another kind that
    someone stored there is an error and not a piece of text.
    """
    return (
        Rule(prefix + "embed_tokens.weight", "text.embed_tokens.weight"),
        Rule(prefix + "layers.{i}.{rest}", "text.layers.{i}.{rest}"),
        Rule(prefix + "norm.weight", "text.norm.weight"),
    )
