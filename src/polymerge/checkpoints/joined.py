"""A checkpoint as it is merged: beside its adapter, `BASE+ADAPTER`, and without what trainers put around its names.

The tensors of an adapter have names that tell them apart from those of its base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from polymerge.checkpoints.adapter import Adapter, is_adapter, open_adapter
from polymerge.checkpoints.folder import Checkpoint, open_checkpoint
from polymerge.checkpoints.tensor_info import Entry
from polymerge.checkpoints.wrappers import unwrapped
from polymerge.errors import CheckpointError, refuse_if_any

__all__ = ["ADAPTER", "adapter_alone", "join", "open_joined", "renamed", "split_source"]

ADAPTER: Final = "adapter/"
"""What the names of an adapter's tensors begin with, once they stand beside those of the base."""

_PLUS: Final = "+"

_EYES: Final = ("vision_config", "mm_vision_tower", "mm_projector_type", "img_processor")
"""What only the configs of multimodal models say."""


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
    return join(open_checkpoint(source, base), open_adapter(source, adapter))


def join(checkpoint: Checkpoint, beside: Adapter) -> Checkpoint:
    """A checkpoint with an adapter beside it.

    An adapter may make another model of its base: LLaVA's is trained on a language model, and brings the projector and
    the config.json of the LLaVA that the two are. Then that is the config, and these weights are tensors like its own.
    """
    entries = dict(checkpoint.entries)
    brought = _brought(checkpoint, beside)
    if brought:
        extras = {name: entry for name, entry in beside.extras.items() if name not in brought}
        beside = replace(beside, extras=MappingProxyType(extras))
        entries |= {name: replace(entry, name=name) for name, entry in brought.items()}
    for entry in beside.entries:
        entries[ADAPTER + entry.name] = replace(entry, name=ADAPTER + entry.name)
    return replace(
        checkpoint,
        config=beside.model_config if brought else checkpoint.config,
        entries=MappingProxyType(entries),
        files=(*checkpoint.files, *beside.files),
        skipped=MappingProxyType({**checkpoint.skipped, **beside.skipped}),
        adapter=beside,
        brought=tuple(brought),
    )


def adapter_alone(adapter: Adapter) -> Checkpoint:
    """An adapter as a checkpoint that has no tensors but its, under their own names."""
    return Checkpoint(
        source=adapter.source,
        folder=adapter.folder,
        config=adapter.model_config,
        entries=MappingProxyType({entry.name: entry for entry in adapter.entries}),
        files=adapter.files,
        layout="safetensors",
        aliases={},
        skipped=adapter.skipped,
        adapter=adapter,
    )


def _brought(checkpoint: Checkpoint, adapter: Adapter) -> dict[str, Entry]:
    """The full weights of an adapter that make another model of its base, by the names that they have there.

    None unless the base is a model without eyes, a config.json beside the adapter is of another one, and every module
    that the adapter changes has its name in the base: then the two lay out what they share alike. A head is the base's.
    """
    ours, theirs = (
        (config.get("architectures"), config.get("model_type")) for config in (checkpoint.config, adapter.model_config)
    )
    shared = all(f"{module}.weight" in checkpoint.entries for module in adapter.pairs)
    if not adapter.model_config or ours == theirs or not shared or any(key in checkpoint.config for key in _EYES):
        return {}
    new = {name: entry for name, entry in adapter.extras.items() if name not in checkpoint.entries}
    return {name: entry for name, entry in new.items() if not name.endswith("lm_head.weight")}


def renamed(checkpoint: Checkpoint, wrappers: Sequence[str]) -> Checkpoint:
    """A checkpoint whose tensors have their names without what trainers put around them; those of an adapter stay.

    wrappers  as `checkpoint.wrapped.unwrapped` takes them

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
