"""Checkpoints on disk: which tensors they hold and where each lies, without reading one."""

from polymerge.checkpoints.folder import Checkpoint, open_checkpoint
from polymerge.checkpoints.tensor_info import Entry

__all__ = ["Checkpoint", "Entry", "open_checkpoint"]
