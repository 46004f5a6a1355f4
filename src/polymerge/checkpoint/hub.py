"""From what a recipe calls a model to where it lies: a local path, or a snapshot of a hub repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from polymerge.errors import CheckpointError, RecipeError, did_you_mean

__all__ = ["locate"]

_HUB_ID: Final = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_WANTED: Final = [
    "*.safetensors",
    "*.bin",
    "*.json",
    "*.txt",
    "*.model",
    "*.py",
    "*.jinja",
    "*.tiktoken",
    "*.pt",
    "*.pth",
]
_UNWANTED: Final = ["consolidated*", "original/*", "*training_args.bin", "optimizer*", "onnx/*", "runs/*"]


def locate(source: str) -> Path:
    """The local path of a model: `source` itself where it exists, else a snapshot of the hub repository it names.

    A path that exists is never looked up anywhere else. A hub id may carry a revision, `owner/name@revision`; it is
    resolved with huggingface_hub, so its cache, token and offline switch (HF_HUB_OFFLINE) hold.

    raises RecipeError where there is neither such a path nor such an id, CheckpointError where the hub fails.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path.resolve() if path.is_dir() else path.absolute()
    found = _HUB_ID.fullmatch(source)
    if found is None or path.is_symlink() or path.parent.is_dir():
        raise RecipeError(f"{source}: there is no such file or folder.{_neighbours(path)}")
    return _snapshot(found["id"], found["revision"])


def _snapshot(repository: str, revision: str | None) -> Path:
    # imported here: a merge of local folders must not pay for it, nor touch the network
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except RepositoryNotFoundError:
        raise RecipeError(
            f"{repository}: there is no such folder here and no such repository on the hub (or it is gated: "
            "accept its licence there and log in with `hf auth login`)"
        ) from None
    except LocalEntryNotFoundError:
        raise RecipeError(
            f"{repository}: there is no such folder here, it is not in the hub's cache, and the hub cannot be reached"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{repository}: the hub did not deliver it: {str(error).splitlines()[0]}") from None


def _neighbours(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    names = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")][:200]
    hint = did_you_mean(path.name, names) if names else ""
    return hint if hint.startswith(" Did") else f" '{parent}' exists, but has no '{path.name}'."
