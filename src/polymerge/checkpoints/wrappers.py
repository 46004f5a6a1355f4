"""Names that trainers put around those of a model: DDP, torch.compile, FSDP, DeepSpeed, PEFT, TRL."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

__all__ = ["is_lora", "unwrapped", "wrappers_in"]

_ANYWHERE: Final = (
    "_orig_mod",  # torch.compile, of the whole or of a part
    "_fsdp_wrapped_module",
    "_fpw_module",  # FSDP in fairscale
    "_checkpoint_wrapped_module",
    "_forward_module",  # Lightning with DeepSpeed
)
"""Whole components of names that no module of a model has; they may stand anywhere, and before some tensors only."""

_BEFORE_ALL: Final = ("module.", "base_model.model.", "pretrained_model.")
"""What may be a name in a model too, and is a wrapper where every tensor has it in front."""

_LORA: Final = (
    ".lora_A.",
    ".lora_B.",
    ".lora_embedding_",
    ".lora_magnitude_vector",
    ".base_layer.",
    ".modules_to_save.",
)
"""What names have in them that PEFT, or loralib, has wrapped and not merged; the last may end them."""


def is_lora(name: str) -> bool:
    """Whether a tensor is of a module that LoRA is in and was not merged into."""
    return any(mark in f"{name}." for mark in _LORA)


def wrappers_in(names: Collection[str]) -> tuple[str, ...]:
    """What trainers have put around the names of a checkpoint, as `unwrapped` takes it, outermost first."""
    found = [f".{part}." for part in _ANYWHERE if any(f".{part}." in f".{name}" for name in names)]
    rest = [unwrapped(name, found) for name in names]
    while rest and (prefix := next((one for one in _BEFORE_ALL if all(name.startswith(one) for name in rest)), None)):
        found.append(prefix)
        rest = [name.removeprefix(prefix) for name in rest]
    return tuple(found)


def unwrapped(name: str, wrappers: Sequence[str]) -> str:
    """A name without wrappers: `.x.` is a component that is taken out wherever it is, `x.` is taken off the front."""
    for wrapper in wrappers:
        if wrapper.startswith("."):
            parts = name.split(".")
            name = ".".join(part for part in parts if part != wrapper.strip("."))
        else:
            name = name.removeprefix(wrapper)
    return name
