"""Places of tensors: which part of a model, which layer of its text tower, which kind of module."""

from __future__ import annotations

from typing import Final, NamedTuple

from polymerge.families.rules import PARTS, text_layer, without_branch

__all__ = ["MODULES", "Place", "place_of"]

MODULES: Final = ("attention", "mlp", "norm", "other")

_ATTENTION: Final = ("attn", "attention")
_MLP: Final = ("mlp", "moe", "ffn", "feed_forward", "experts")


class Place(NamedTuple):
    """A part (`unknown` if the family is), a layer of the text tower (None outside its layers), a module."""

    part: str
    layer: int | None
    module: str


def place_of(canonical: str) -> Place:
    """The place of a tensor or module, by its canonical name.

    Norms count as norms, also inside attention; embeddings, heads and projections are `other`. Of several
    names joined by `+`, as for fused modules, the first counts.
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
