"""The files of one commit of a hub repository, before they are here: their names, sizes and headers.

A commit is seen as a folder of links into the hub's own cache, in the user's cache folder:

    polymerge/views/<cache>/owner/name/<commit>/   a link for every file that can matter; it dangles until that is here
    polymerge/hub/owner/name/<commit>.json         the size of each, and the sha256 where the hub says it
    polymerge/hub/owner/name/<commit>.heads/       of each safetensors file its size and its header

So a repository that is not here looks as a folder does, and is one as soon as its files have arrived.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from types import MappingProxyType
from typing import Any, Final

from polymerge.checkpoints.discovery import COMPANIONS, LAYOUTS, of_training
from polymerge.checkpoints.hub_errors import hub_errors, unreachable
from polymerge.checkpoints.safetensors import HEADER_LIMIT, LENGTH_BYTES, Head
from polymerge.errors import CheckpointError

__all__ = [
    "Listed",
    "Remote",
    "companions",
    "head_of",
    "is_plain",
    "listed_alike",
    "listing",
    "missing_remote",
    "remote_of",
    "view",
]

_WANTED: Final = (
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
)
_UNWANTED: Final = ("consolidated*", "original/*", "*training_args.bin", "optimizer*", "onnx/*", "runs/*")
_FIRST: Final = 1 << 16
"""Bytes of a safetensors file that are asked for first; the headers of most end within."""
_TRIES: Final = 3
_PAUSE: Final = 1.0  # seconds before a header is asked for again


@dataclass(frozen=True, slots=True)
class Remote:
    """A file of a commit of a hub repository."""

    repository: str
    commit: str
    name: str
    """As a path in the repository."""

    @property
    def pinned(self) -> str:
        """The repository as a recipe names this commit of it."""
        return f"{self.repository}@{self.commit}"


@dataclass(frozen=True, slots=True)
class Listed:
    """What the hub says of a file before it is here."""

    size: int
    sha256: str | None = None
    """None for a file that lies in git itself, as small ones do."""
    blob: str | None = None
    """What git calls its content, or that of what stands for it there; None where it was not noted."""


def view(repository: str, snapshot: Path) -> Path:
    """The folder of links for the commit that a snapshot in the hub's cache is of.

    Where the hub cannot be asked and was not asked before, it is the snapshot itself: what is there is all there is.
    """
    commit = snapshot.name
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        raise CheckpointError(f"{repository}: the hub calls its commit '{commit}', which is none. Try another endpoint")
    # of each cache its own: who uses another one must not turn the links of a merge that is running
    folder = _views() / hashlib.sha256(str(snapshot.parents[2]).encode()).hexdigest()[:8] / repository / commit
    if folder.is_dir():
        return folder
    with hub_errors(repository, commit):
        try:
            names = _ask(repository, commit)
        except unreachable():
            return snapshot.resolve()
    fresh = folder.with_name(f".{commit}.{os.getpid()}.{threading.get_ident()}")
    try:
        for name in names:
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).symlink_to(snapshot / name)
        fresh.rename(folder)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if not folder.is_dir():  # or somebody else has made it since
            raise _no_room(folder, error) from None
    return folder


def remote_of(file: Path) -> Remote | None:
    """Which file of the hub a path in a folder of links stands for, or the folder itself; None for any other path."""
    views = _views()
    if views not in file.parents:
        return None
    _, owner, name, commit, *rest = (*file.relative_to(views).parts, "", "", "")
    return Remote(f"{owner}/{name}", commit, "/".join(filter(None, rest)))


def missing_remote(file: Path) -> Remote | None:
    """Which file of the hub a path stands for, as long as it is not here."""
    return None if file.exists() else remote_of(file)


def companions(folder: Path, names: Collection[str] | None = None) -> list[Path]:
    """What belongs to a checkpoint beside its weights, or what it has of `names`, as paths in its folder of links.

    None for a local folder, where all that there is is there.
    """
    if remote_of(folder) is None:
        return []
    beside = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if not file.is_dir()}
    return [
        file
        for name, file in beside.items()
        if (file.suffix not in LAYOUTS or name in COMPANIONS) and (names is None or name in names)
    ]


def listed_alike(one: Path, other: Path) -> bool:
    """Whether two files are of the hub and it says that their content is the same, so that neither has to come."""
    blobs = []
    for remote in map(remote_of, (one, other)):
        listed = listing(remote.repository, remote.commit).get(remote.name) if remote else None
        blobs.append(listed.blob if listed else None)
    return None not in blobs and blobs[0] == blobs[1]


def listing(repository: str, commit: str) -> Mapping[str, Listed]:
    """The files of a commit that can matter, each with what the hub says of it; asked once and kept."""
    with hub_errors(repository, commit):
        return _ask(repository, commit)


@lru_cache(maxsize=256)
def _ask(repository: str, commit: str) -> Mapping[str, Listed]:
    note = _root() / repository / f"{commit}.json"
    with suppress(OSError, ValueError, TypeError, AttributeError):  # not asked yet, or nothing that we have written
        kept = {name: Listed(*said) for name, said in json.loads(note.read_bytes()).items()}
        if all(is_plain(name) and isinstance(one.size, int) and _is_hash(one.sha256) for name, one in kept.items()):
            return MappingProxyType(kept)
    from huggingface_hub import HfApi

    info = HfApi().model_info(repository, revision=commit, files_metadata=True)
    found = {
        file.rfilename: Listed(
            file.size or 0, file.lfs.sha256 if file.lfs and _is_hash(file.lfs.sha256) else None, file.blob_id
        )
        for file in info.siblings or ()
        if _matters(file.rfilename)
    }
    if outside := [name for name in found if not is_plain(name)]:
        raise CheckpointError(f"{repository}: lists '{outside[0]}', which is no plain path. Do not use it")
    listed = {name: [one.size, one.sha256, one.blob] for name, one in found.items()}
    _write(note, json.dumps(listed, indent=1).encode())
    return MappingProxyType(found)


def is_plain(name: str) -> bool:
    """Whether a file's name is a path that stays below the folder it is relative to."""
    parts = name.split("/")
    return (
        not PureWindowsPath(name).anchor  # a drive, a share or a leading slash
        and not any(part in ("", ".", "..") for part in parts)
        and not any(character in name for character in "\\\0")
    )


def head_of(file: Path, remote: Remote) -> Head:
    """The header of a safetensors file that is not here, and the file's size; fetched once, in one request or two.

    raises CheckpointError where the hub delivers something else than it lists.
    """
    kept = _root() / remote.repository / f"{remote.commit}.heads" / remote.name
    if kept.is_file():
        raw = kept.read_bytes()
        return Head(raw[LENGTH_BYTES:], int.from_bytes(raw[:LENGTH_BYTES], "little"))
    listed = listing(remote.repository, remote.commit).get(remote.name)
    if listed is None:
        raise CheckpointError(f"{file}: {remote.repository} has no such file on the hub. Its index is of another model")
    size = listed.size
    text = _range(remote, 0, min(_FIRST, size), size)
    length = int.from_bytes(text[:LENGTH_BYTES], "little")
    end = min(LENGTH_BYTES + length, size)
    if len(text) < end and length <= HEADER_LIMIT:
        text += _range(remote, len(text), end, size)
    head = Head(text[:end], size)
    _write(kept, size.to_bytes(LENGTH_BYTES, "little") + head.text)
    return head


def _range(remote: Remote, start: int, stop: int, size: int) -> bytes:
    """The bytes `start` to `stop` of a file of `size` bytes; asked for again where the connection breaks."""
    if start >= stop:
        return b""
    broken, _ = unreachable()
    with hub_errors(remote.repository, remote.commit, remote.name):
        for _ in range(_TRIES - 1):
            try:
                return _asked(remote, start, stop, size)
            except broken:
                time.sleep(_PAUSE)
        return _asked(remote, start, stop, size)


def _asked(remote: Remote, start: int, stop: int, size: int) -> bytes:
    """What a server sends for a range; no more is taken from one that sends all of the file."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
        http_stream_backoff,
    )

    url = hf_hub_url(remote.repository, remote.name, revision=remote.commit)
    wanted = {**build_hf_headers(), "range": f"bytes={start}-{stop - 1}", "accept-encoding": "identity"}
    found = bytearray()
    # what it would retry by itself includes a body that breaks, and for that it has no second answer
    more: dict[str, Any] = {"timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT, "retry_on_exceptions": ()}
    with http_stream_backoff("GET", url, headers=wanted, **more) as response:
        hf_raise_for_status(response)
        partial = response.status_code == 206
        said = response.headers.get("content-range" if partial else "content-length", "")
        total = said.rpartition("/")[2]
        if total.isdigit() and int(total) != size:
            raise CheckpointError(
                f"{remote.repository}: '{remote.name}' is {size} bytes long by the hub's list, {total} by what it "
                "serves. Try again"
            )
        skipped = 0 if partial else start
        for chunk in response.iter_bytes():
            found += chunk
            if len(found) >= skipped + stop - start:
                break
    text = bytes(found[skipped : skipped + stop - start])
    if len(text) < stop - start or (partial and not said.startswith(f"bytes {start}-")):
        raise CheckpointError(
            f"{remote.repository}: '{remote.name}': asked for bytes {start} to {stop}, got {len(text)} ({said}). Try "
            "again"
        )
    return text


def _write(file: Path, data: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_name(f".{file.name}.{os.getpid()}")
        fresh.write_bytes(data)
        fresh.replace(file)
    except OSError as error:
        raise _no_room(file, error) from None


def _no_room(file: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{file}: cannot be written: {error.strerror}. Set XDG_CACHE_HOME to a folder that can")


def _is_hash(text: object) -> bool:
    return text is None or (isinstance(text, str) and re.fullmatch(r"[0-9a-f]{64}", text) is not None)


def _matters(name: str) -> bool:
    wanted = any(fnmatch(name, one) for one in _WANTED) and not any(fnmatch(name, one) for one in _UNWANTED)
    return wanted and not of_training(name)


def _root() -> Path:
    return _own_cache() / "hub"


def _views() -> Path:
    return _own_cache() / "views"


def _own_cache() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches).resolve() / "polymerge"
