"""Read a whole tensor of an adapter."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from polymerge.checkpoints import TensorInfo
from polymerge.checkpoints.files import read_tensor
from polymerge.errors import CheckpointError
from polymerge.methods import kernels

__all__ = ["stored_values"]


def stored_values(tensor: TensorInfo) -> Any:
    """The numbers of a tensor on disk as float32, in its shape; raises CheckpointError where it cannot, or for NaN."""
    values: Any = np.empty(prod(tensor.shape), np.float32)
    if not kernels.decode(np.frombuffer(read_tensor(tensor), np.uint8), tensor.dtype, values):
        raise CheckpointError(f"{tensor.file}: {tensor.name} holds NaN or infinity. Mend the adapter")
    return values.reshape(tensor.shape)
