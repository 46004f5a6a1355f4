"""The location of a tensor on disk, as all checkpoint readers report it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from polymerge.errors import shown

__all__ = ["Contents", "TensorInfo", "listed"]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The location of one tensor's bytes.

    The bytes are contiguous, row-major and little-endian in every file format.
    """

    name: str
    dtype: str
    """The safetensors name, a key of `dtypes.BITS`."""
    shape: tuple[int, ...]
    file: Path
    start: int
    """Offset of the first byte from the beginning of the file."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class Contents:
    """The content of one weight file."""

    entries: tuple[TensorInfo, ...]
    """In order of offset."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """A name -> the earlier name with exactly the same bytes."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Objects that are not tensors of the model -> why they are left out."""


def listed(names: Collection[str], most: int = 3) -> str:
    """The first few names for a message: `'a', 'b', 'c' and 7 more`."""
    first = ", ".join(f"'{shown(name)}'" for name in islice(names, most))
    return f"{first} and {len(names) - most} more" if len(names) > most else first
