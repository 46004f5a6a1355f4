"""A checkpoint as it is merged: beside its adapter, `BASE+ADAPTER`, and without what trainers put around its names.

The tensors of an adapter have names that tell them apart from those of its base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from polymerge.checkpoint.adapter import is_adapter, open_adapter
from polymerge.checkpoint.folder import Checkpoint, open_checkpoint
from polymerge.checkpoint.wrappers import unwrapped
from polymerge.errors import CheckpointError, refuse_if_any

__all__ = ["ADAPTER", "open_joined", "renamed", "split_source"]

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


def renamed(checkpoint: Checkpoint, wrappers: Sequence[str]) -> Checkpoint:
    """A checkpoint whose tensors have their names without what trainers put around them; those of an adapter stay.

    wrappers  as `checkpoint.wrappers.unwrapped` takes them

    raises Refused where two tensors then have one name.
    """
    if not wrappers:
        return checkpoint
    plain = {name: name if name.startswith(ADAPTER) else unwrapped(name, wrappers) for name in checkpoint.entries}
    first: dict[str, str] = {}
    refuse_if_any(
        CheckpointError(
            f"{checkpoint.folder}: '{first[name]}' and '{own}' are one tensor, '{name}', without what a trainer put "
            "around their names. Keep one of them in the checkpoint."
        )
        for own, name in plain.items()
        if first.setdefault(name, own) != own
    )
    return replace(
        checkpoint,
        entries=MappingProxyType({plain[own]: replace(e, name=plain[own]) for own, e in checkpoint.entries.items()}),
        aliases=MappingProxyType({plain[name]: plain[earlier] for name, earlier in checkpoint.aliases.items()}),
    )
