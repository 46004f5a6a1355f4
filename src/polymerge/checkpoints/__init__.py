"""Checkpoints on disk: their tensors and the location of each, from headers alone."""

from polymerge.checkpoints.folder import Checkpoint, open_checkpoint
from polymerge.checkpoints.tensor_info import TensorInfo

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]
