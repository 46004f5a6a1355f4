"""What the merges of reference code share: how their tensors are packed and loaded, and how far rounding goes."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as unpacked
from safetensors.torch import load_file
from torch import Tensor

Floats = NDArray[Any]
Bools = NDArray[np.bool_]

DEVIATIONS = 5
"""How far from its expectation a count may be, in standard deviations: once in 1.7 million by chance."""

FLOAT32_STEPS = 16 * 2.0**-24
"""Sixteen roundings in float32, of the magnitudes that are added up."""

FORMATS = {torch.float16: (11, -14), torch.bfloat16: (8, -126), torch.float32: (24, -126)}
"""By dtype, its bits of precision and the exponent of its smallest normal number."""


def half_step(dtype: torch.dtype, magnitude: Any) -> Floats:
    """How far a number of this magnitude may be from the nearest one of `dtype`."""
    bits, lowest = FORMATS[dtype]
    exponent = np.frexp(np.abs(np.asarray(magnitude, np.float64)))[1] - 1
    return np.ldexp(1.0, np.maximum(exponent, lowest) - bits)


def load(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            found |= load_file(file)
        elif file.suffix == ".bin":
            found |= torch.load(file, weights_only=True)
    return found


def packed_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file that is packed with xz: random bytes shrink by a third."""
    return unpacked(lzma.decompress(file.read_bytes()))
