"""A checkpoint that stands with an adapter, `BASE+ADAPTER`: the tensors of both, under names that tell them apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from polymerge.checkpoint.adapter import is_adapter, open_adapter
from polymerge.checkpoint.folder import Checkpoint, open_checkpoint

__all__ = ["ADAPTER", "open_joined", "split_source"]

ADAPTER: Final = "adapter/"
"""What the names of an adapter's tensors begin with, once they stand beside those of the base."""

_PLUS: Final = "+"


def split_source(source: str) -> tuple[str, str | None]:
    """What a recipe calls a base and its adapter, `BASE+ADAPTER`; None where the source is one model.

    A path that exists is one model, whatever characters it has.
    """
    if _PLUS not in source or Path(source).expanduser().exists():
        return source, None
    cuts = [place for place, character in enumerate(source) if character == _PLUS]
    there = [cut for cut in reversed(cuts) if is_adapter(Path(source[cut + 1 :]).expanduser())]
    cut = (there or cuts[-1:])[0]
    return source[:cut], source[cut + 1 :]


def open_joined(source: str, base: Path, adapter: Path) -> Checkpoint:
    """Open a checkpoint with an adapter beside it; raises what `open_checkpoint` and `open_adapter` raise."""
    checkpoint = open_checkpoint(source, base)
    beside = open_adapter(source, adapter)
    entries = dict(checkpoint.entries)
    for entry in beside.entries:
        entries[ADAPTER + entry.name] = replace(entry, name=ADAPTER + entry.name)
    return replace(
        checkpoint,
        entries=MappingProxyType(entries),
        files=(*checkpoint.files, *beside.files),
        skipped=MappingProxyType({**checkpoint.skipped, **beside.skipped}),
        adapter=beside,
    )
