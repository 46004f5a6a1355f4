"""Where in a model a tensor belongs, as its canonical name says: part, layer, and kind of module."""

from __future__ import annotations

from typing import Final, NamedTuple

from polymerge.families.rules import PARTS, text_layer, without_branch

__all__ = ["MODULES", "Place", "place_of"]

MODULES: Final = ("attention", "mlp", "norm", "other")

_ATTENTION: Final = ("attn", "attention")
_MLP: Final = ("mlp", "moe", "ffn", "feed_forward", "experts")


class Place(NamedTuple):
    """A part (`unknown` where the family is), a layer of the text tower (None outside its layers), a module."""

    part: str
    layer: int | None
    module: str


def place_of(canonical: str) -> Place:
    """The place of a canonical name, of a tensor or of a module.

    A norm is one wherever it stands, in an attention too; embeddings, heads and projections are `other`. Of several
    names joined by `+`, which is how a fused module is called, the first counts.
    """
    name = without_branch(canonical.partition("+")[0])
    part = name.partition(".")[0]
    if part not in PARTS:
        part = "unknown"
    *around, last = name.removesuffix(".weight").removesuffix(".bias").split(".")
    if "norm" in last or last.startswith("ln"):
        module = "norm"
    elif any(word in one for one in (*around, last) for word in _ATTENTION):
        module = "attention"
    elif any(word in one for one in (*around, last) for word in _MLP):
        module = "mlp"
    else:
        module = "other"
    return Place(part, text_layer(name), module)
