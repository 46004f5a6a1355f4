"""The files beside a checkpoint's weights that an output takes over: found first, then copied as real files.

A folder may come from anybody, and who merges may read more than who gets the output. So only what lies in the folder
is copied: through a link that leads out of it, a stranger would choose what the output gives away.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from polymerge.checkpoints.bounds import TOKENIZER_BYTES, file_kind
from polymerge.checkpoints.discovery import COMPANIONS, CONFIG, of_training
from polymerge.checkpoints.hub import missing_remote, remote_of
from polymerge.checkpoints.identity import file_digest
from polymerge.errors import CheckpointError, refuse, refuse_if_any

__all__ = ["companion_files", "copy_files", "text_digests", "unfit"]

_WEIGHTS: Final = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_OURS: Final = ("README.md", "polymerge.json")
_CODE_AND_TEXT: Final = (".py", ".json", ".jinja", ".txt", ".model")
_CONFIGS: Final = ("config.json", CONFIG)

_SHARED_BLOB: Final = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}")
"""What the hub's cache keeps once for all repositories, in its own folder of blobs."""


def companion_files(folder: Path, without: Collection[str] = (), *, deep: bool = True) -> dict[str, Path]:
    """The files that accompany a checkpoint's weights, by their paths in its folder: config, tokenizer, processor, chat
    template, remote code.

    Weights, model cards and what starts with a dot are not among them, nor what training left, nor pictures and the
    like in folders below. Linked folders are not entered.

    without  paths of files that the output takes from elsewhere, or not at all
    deep     whether to look into folders

    Refuses every file that `unfit` finds a reason against, and folders that lie elsewhere or cannot be read.
    """
    found: dict[str, Path] = {}
    problems: list[CheckpointError | None] = []

    def closed(error: OSError) -> None:
        problems.append(CheckpointError(f"{error.filename}: cannot be read: {error.strerror}. Check its permissions."))

    for place, folders, files in os.walk(folder, onerror=closed):
        inside = Path(place).relative_to(folder)
        folders[:] = [name for name in folders if deep and not _passed_over((inside / name).as_posix() + "/")]
        problems += [unfit(path, folder) for name in folders if (path := Path(place, name)).is_symlink()]
        for name in map(inside.__truediv__, files):
            if name.name.endswith(_WEIGHTS) and name.name not in COMPANIONS:
                continue
            if len(name.parts) > 1 and name.suffix not in _CODE_AND_TEXT:
                continue
            if name.as_posix() not in without and not _passed_over(name.as_posix()):
                found[name.as_posix()] = folder / name
    found = dict(sorted(found.items()))
    refuse(*filter(None, (*(unfit(path, folder) for path in found.values()), *problems)))
    return found


def text_digests(folder: Path) -> dict[str, str]:
    """The sha256 of the files that lie in a folder beside weights, by name: tokenizer, chat template, processor, code.

    Configs are not among them, for they are compared by value, nor what cannot be read, nor what is larger than any
    tokenizer. Empty for what is on the hub, which a commit tells.
    """
    if remote_of(folder) is not None:
        return {}
    found: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        text = path.suffix in (*_CODE_AND_TEXT, ".tiktoken") and not path.name.endswith(".index.json")
        if not text or path.name in _CONFIGS or _passed_over(path.name) or not path.is_file():
            continue
        with suppress(CheckpointError, OSError):  # which is said of it where it is needed
            if path.stat().st_size <= TOKENIZER_BYTES:
                found[path.name] = file_digest(path)
    return found


def _passed_over(name: str) -> bool:
    return name in _OURS or any(part.startswith(".") for part in name.split("/")) or of_training(name)


def unfit(path: Path, folder: Path) -> CheckpointError | None:
    """Why a file of a folder, or a link there, cannot be copied into an output; None if it can.

    What can: a file that can be read, a link to one that is not hidden in the same folder, and in the hub's cache,
    which consists of links, a link to one of its own blobs, whether that has been downloaded or not.

    folder  absolute and without links
    """
    try:
        if not path.exists():
            return None if missing_remote(path) else _gone(path)
        if path.is_symlink() and _leads_out(path, folder):
            what = "folder" if path.is_dir() else "file"
            return CheckpointError(
                f"{path}: is a link out of its folder, to {path.readlink()}. Only what lies there is taken into an "
                f"output. Put the {what} itself in its place, or remove the link."
            )
        if not path.is_dir():
            if not path.is_file():
                kind = file_kind(path.stat().st_mode)
                return CheckpointError(f"{path}: is {kind} and no file, so it cannot be copied. Remove it.")
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    except OSError as error:
        return CheckpointError(f"{path}: cannot be read: {error.strerror}. Check its permissions.")
    return None


def _gone(path: Path) -> CheckpointError:
    if path.is_symlink():
        return CheckpointError(f"{path}: is a broken link. Restore its target, or remove the link.")
    return CheckpointError(f"{path}: is no longer there. Restore it, and merge again.")


def _leads_out(link: Path, folder: Path) -> bool:
    """Whether a link ends neither in its folder nor, in the hub's cache, among the blobs of its repository."""
    if remote_of(link) is not None:  # our own link into the hub's cache, where that one's rules hold
        link = link.readlink()
        if not link.is_symlink():
            return False
        folder = link.parent.resolve()
    end = link.resolve()
    if end.is_relative_to(folder):
        return any(part.startswith(".") for part in end.relative_to(folder).parts)
    for snapshot in (folder, *folder.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repository.name.startswith("models--"):
            shared = repository.parent / "blobs"
            among_shared = end.is_relative_to(shared) and _SHARED_BLOB.fullmatch(end.relative_to(shared).as_posix())
            return end.parent != repository / "blobs" and not among_shared
    return True


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy files into a folder, each under its path there, as real files.

    raises CheckpointError where one is gone, or can no longer be read: an output without it would be another model.
    """
    refuse_if_any(_gone(path) for path in files.values() if not path.exists())
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(path, folder / name)
        except OSError as error:
            if error.filename != str(path):
                raise
            raise CheckpointError(f"{path}: cannot be read any more: {error.strerror}. Merge again.") from None
