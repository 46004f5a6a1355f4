"""Open a plan's inputs again, to carry it out."""

from __future__ import annotations

from pathlib import Path

from polymerge.checkpoint import Checkpoint, open_checkpoint
from polymerge.checkpoint.joined import open_joined
from polymerge.errors import CheckpointError
from polymerge.planning import Input
from polymerge.planning.inputs import headers_digest

__all__ = ["reopen"]


def reopen(recorded: Input) -> Checkpoint:
    """An input's headers, refused where they are no longer what was planned with."""
    path = Path(recorded.path)
    if recorded.adapter:
        checkpoint = open_joined(recorded.source, path, Path(recorded.adapter))
    else:
        checkpoint = open_checkpoint(recorded.source, path)
    if headers_digest(checkpoint) != recorded.headers:
        raise CheckpointError(f"{recorded.path}: its tensors have changed since it was planned. Plan again")
    return checkpoint
