"""Checkpoints on disk: which tensors they hold and where each lies, without reading one."""

from polymerge.checkpoint.entry import Entry
from polymerge.checkpoint.folder import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "Entry", "open_checkpoint"]
