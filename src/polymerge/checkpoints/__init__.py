"""Checkpoints on disk: which tensors they hold and where each lies, without reading one."""

from polymerge.checkpoints.folder import Checkpoint, open_checkpoint
from polymerge.checkpoints.tensor_info import TensorInfo

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]
