"""A model that is to be loaded as it lies: all of it here, where it comes from the hub; and which commit that is."""

from __future__ import annotations

import re
from pathlib import Path

from polymerge.checkpoints.adapter import is_adapter, open_adapter
from polymerge.checkpoints.discovery import find_weights
from polymerge.checkpoints.hub_files import companions, remote_of
from polymerge.checkpoints.index import read_index
from polymerge.checkpoints.prefetch import fetch_all

__all__ = ["bring", "pinned"]


def bring(source: str, folder: Path) -> None:
    """Fetch all that loading a model takes: the weights that are read, and what lies beside them.

    folder  what `locate` gave for `source`; nothing happens for a local one

    raises RecipeError where there are no weights, or they cannot be had, CheckpointError where the hub fails.
    """
    remote = remote_of(folder)
    if remote is None:
        return
    if is_adapter(folder):
        weights = list(open_adapter(source, folder).files)
    else:
        chosen = find_weights(folder)
        names = {*chosen.files, *([chosen.whole] if chosen.whole else [])}
        if chosen.index:
            names |= set(read_index(folder / chosen.index).values())
        weights = [folder / name for name in sorted(names)]
    fetch_all([*companions(folder), *weights])


def pinned(folder: Path, adapter: Path | None = None) -> str:
    """What a recipe says to have these very files again, `owner/name@commit`; empty where nothing is of the hub.

    adapter  of a base that stands with one
    """
    places = [folder, *([adapter] if adapter else [])]
    commits = [_commit(place) for place in places]
    return "+".join(commit or str(place) for commit, place in zip(commits, places, strict=True)) if any(commits) else ""


def _commit(folder: Path) -> str:
    remote = remote_of(folder)
    if remote is not None:
        return remote.pinned
    snapshot = re.fullmatch(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40,64})", "/".join(folder.parts[-3:]))
    return f"{snapshot[1]}/{snapshot[2]}@{snapshot[3]}" if snapshot else ""
