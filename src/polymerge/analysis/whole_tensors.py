"""Read a whole tensor of an adapter."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from polymerge.checkpoints import Entry
from polymerge.checkpoints.prefetch import fetched
from polymerge.errors import CheckpointError
from polymerge.methods import kernels

__all__ = ["stored_values"]


def stored_values(entry: Entry) -> Any:
    """The numbers of a tensor on disk as float32, in its shape; raises CheckpointError where it cannot, or for NaN."""
    values: Any = np.empty(prod(entry.shape), np.float32)
    fetched(entry.file)
    try:
        with entry.file.open("rb") as file:
            file.seek(entry.start)
            raw = np.frombuffer(bytearray(file.read(entry.nbytes)), np.uint8)
    except OSError as error:
        raise CheckpointError(f"{entry.file}: cannot be read: {error.strerror}") from None
    if len(raw) < entry.nbytes:
        raise CheckpointError(f"{entry.file}: ends inside {entry.name}; it became shorter since its header was read")
    if not kernels.decode(raw, entry.dtype, values):
        raise CheckpointError(f"{entry.file}: {entry.name} holds NaN or infinity. Mend the adapter")
    return values.reshape(entry.shape)
