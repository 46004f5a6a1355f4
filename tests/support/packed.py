"""Golden tensors are packed with xz: random bytes shrink by a third."""

from __future__ import annotations

import lzma
from pathlib import Path

from safetensors.torch import load
from torch import Tensor

__all__ = ["packed_tensors"]


def packed_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a packed safetensors file."""
    return load(lzma.decompress(file.read_bytes()))
