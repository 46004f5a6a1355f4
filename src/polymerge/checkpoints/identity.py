"""Identify files: by their sha256, cached, by samples of their content, and by stamps."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeAlias

from polymerge.checkpoints.bounds import CONFIG_BYTES, open_regular, read_bounded
from polymerge.checkpoints.hub import remote_of
from polymerge.checkpoints.hub_api import own_cache

__all__ = ["Stamp", "content_digest", "file_digest", "sha256_of", "stamps_of"]

Stamp: TypeAlias = "tuple[int, int] | None"
"""Size in bytes and modification time in nanoseconds of a file; None for a remote one."""

_CHUNK: Final = 1 << 22
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_CONTENT: Final = (".safetensors", ".bin", ".pt", ".pth", ".json", ".model", ".jinja", ".py", ".tiktoken")


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal.

    The hub's cache names large files by their sha256, which is trusted. Other digests are cached in the
    user's cache folder by path, size, inode and change time, and recomputed if one of them differs.
    """
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name
    stat = real.stat()
    seen = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    note = own_cache("sha256") / f"{hashlib.sha256(os.fsencode(real)).hexdigest()}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(read_bounded(note, CONFIG_BYTES))
        if kept["seen"] == seen:
            return str(kept["sha256"])
    digest = sha256_of(real)
    with suppress(OSError):  # a cache that cannot be written is slower, not wrong
        note.parent.mkdir(parents=True, exist_ok=True)
        fresh = note.with_name(f"{note.name}.{os.getpid()}")
        fresh.write_text(json.dumps({"path": str(real), "seen": seen, "sha256": digest}), encoding="utf-8")
        fresh.replace(note)
    return digest


def stamps_of(files: Iterable[Path]) -> tuple[Stamp, ...]:
    """Stamps that show, without reading content, whether files were written since."""
    stamps: list[Stamp] = []
    for file in files:
        try:
            found = file.stat()
        except OSError:
            stamps.append(None)
        else:
            stamps.append((found.st_size, found.st_mtime_ns))
    return tuple(stamps)


def sha256_of(path: Path) -> str:
    """Compute the sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with open_regular(path) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def content_digest(places: Iterable[Path]) -> str:
    """sha256 over the files of folders: names, sizes, and blocks of content spread over each file.

    Any training changes nearly every number of the tensors that it changes, so that the blocks tell, and copying or
    touching a file changes nothing. What lies on the hub is told by its commit, whether its files are here or not.
    """
    digest = hashlib.sha256()
    for place in places:
        remote = remote_of(place)
        if remote is not None:
            digest.update(f"{remote.repository}\0{remote.commit}\0".encode())
            continue
        for file in [place] if place.is_file() else sorted(place.iterdir()):
            if file.is_file() and file.suffix in _CONTENT and file.name != "polymerge.json":
                digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
                _sample(file, digest)
    return digest.hexdigest()


def _sample(file: Path, digest: hashlib._Hash) -> None:
    size = file.stat().st_size
    with open_regular(file) as stream:
        for number in range(_SAMPLES):
            stream.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
            if size <= _SAMPLE_BYTES:
                return
