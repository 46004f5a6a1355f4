"""Identify files: by samples of their content, by their sha256, remembered, and by stamps."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from polymerge.checkpoints.bounds import CONFIG_BYTES, read_bounded
from polymerge.checkpoints.hub import remote_of
from polymerge.checkpoints.ranges import opened_ranges
from polymerge.checkpoints.safetensors import read_safetensors
from polymerge.checkpoints.stores import current, stored_at, view_of
from polymerge.durable import make_folder, write_file
from polymerge.errors import CheckpointError, OutputError, PolymergeError
from polymerge.paths import own_cache

__all__ = [
    "YOUNG",
    "Identity",
    "Stamp",
    "Stamps",
    "changed_since",
    "content_digest",
    "file_digest",
    "sampled_digest",
    "sha256_of",
    "stamp_of",
    "stamps_of",
]


class Stamp(NamedTuple):
    """What tells, without reading its content, that a file was written or replaced; times are in nanoseconds."""

    size: int
    modified: int
    changed: int
    """When content, permissions or links of it changed last, which no program can set."""
    inode: int
    device: int
    tag: str = ""
    """Of an object in a store, what it has instead of times, inode and device (`stores`)."""


class Identity(NamedTuple):
    """What a file is known by, as polymerge.json says it: `sampled_digest`, and its sha256 where that is known."""

    sampled: str
    sha256: str | None


Stamps: TypeAlias = Mapping[Path, "Stamp | None"]
"""The stamps of files when they were first read; None for what is still on the hub."""

YOUNG: Final = 2 * 10**9
"""Nanoseconds that the coarsest clock of a filesystem, that of FAT, cannot tell apart: a younger file may be written to
and keep its stamp.
"""

_CHUNK: Final = 1 << 22
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_CONTENT: Final = (".safetensors", ".bin", ".pt", ".pth", ".json", ".model", ".jinja", ".py", ".tiktoken")


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal.

    It is remembered in the user's cache folder with the file's stamp, unless the file is so young that a later change
    could leave that stamp as it is, and computed again if the stamp differs. The name of a file proves nothing: the
    hub's cache names large files by their sha256, and a copy of it may hold anything.

    raises CheckpointError if the file cannot be read, or changes while it is.
    """
    if stored_at(path) is not None:
        return sha256_of(path)
    real = path.resolve()
    note = own_cache("sha256") / f"{hashlib.sha256(os.fsencode(real)).hexdigest()}.json"
    now, stamp = time.time_ns(), stamp_of(real)
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(read_bounded(note, CONFIG_BYTES))
        if stamp is not None and kept["seen"] == list(stamp):
            return str(kept["sha256"])
    try:
        digest = sha256_of(real)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}. Check its permissions.") from None
    for changed in changed_since({path: stamp}):
        raise changed
    if stamp is None or now - max(stamp.modified, stamp.changed) < YOUNG:
        return digest
    with suppress(OutputError):  # a cache that cannot be written is slower, not wrong
        make_folder(note.parent)
        write_file(note, json.dumps({"path": str(real), "seen": stamp, "sha256": digest}))
    return digest


def stamp_of(file: Path) -> Stamp | None:
    """The stamp of a file, or of what a link leads to, of an object when it was listed; None if it is not here."""
    if (stored := stored_at(file)) is not None:
        return Stamp(stored.size, 0, 0, 0, 0, stored.tag)
    try:
        found = file.stat()
    except OSError:
        return None
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)


def stamps_of(files: Iterable[Path]) -> dict[Path, Stamp | None]:
    """The stamps of files, to be taken before they are read; what neither exists nor is a link has none."""
    return {file: stamp for file in files if (stamp := stamp_of(file)) or file.is_symlink()}


def changed_since(stamps: Stamps) -> Iterator[CheckpointError]:
    """An error for each file that is not as it was when its stamp was taken; what was on the hub then may be here."""
    objects = current(stamps)
    for file, before in stamps.items():
        if file in objects:
            now = Stamp(found[0], 0, 0, 0, 0, found[1]) if (found := objects[file]) else None
        else:
            now = stamp_of(file)
            if before and before.tag and now and view_of(file) and now.size == before.size:
                continue  # it has been fetched since
        # a file that was replaced has another time of change; another number alone comes of network filesystems that
        # number a file anew once they have forgotten it
        if before is not None and (now is None or (before[:3], before.tag) != (now[:3], now.tag)):
            yield CheckpointError(
                f"{file}: {_difference(before, now)} while it was being read, so that what was read may be of two "
                "states. Start again when nothing writes to it"
            )


def _difference(before: Stamp, now: Stamp | None) -> str:
    if now is None:
        return "was taken away"
    if before.tag != now.tag:
        return "was replaced in its store"
    if (before.inode, before.device) != (now.inode, now.device):
        return "was replaced by another file"
    if before.size != now.size:
        return f"changed from {before.size} to {now.size} bytes"
    return "was written to" if before.modified != now.modified else "was touched (its time of change differs)"


def sha256_of(path: Path) -> str:
    """Compute the sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with opened_ranges(path) as file:
        done = 0
        while count := file.read_into(view, done):
            digest.update(view[:count])
            done += count
    return digest.hexdigest()


def content_digest(places: Iterable[Path]) -> str:
    """sha256 over the files of folders: their names, and what `sampled_digest` takes of each.

    Copying or touching a file changes nothing. What lies on the hub is told by its commit, whether its files are here
    or not, and what lies in a store by the tags of the objects.
    """
    digest = hashlib.sha256()
    for place in places:
        remote = remote_of(place)
        if remote is not None:
            digest.update(f"{remote.repository}\0{remote.commit}\0".encode())
            continue
        if (of := view_of(place)) is not None:
            digest.update(f"{of[1]}\0{of[0].name}\0".encode())
            continue
        for file in [place] if place.is_file() else sorted(place.iterdir()):
            if file.is_file() and file.suffix in _CONTENT and file.name != "polymerge.json":
                digest.update(f"{file.name}\0".encode())
                _sample(file, digest)
    return digest.hexdigest()


def sampled_digest(path: Path) -> str:
    """sha256 over a file's size, the header of a safetensors file, and blocks of its content.

    The blocks are 4 KiB long: one in the middle of each tensor, where the header tells of them, and 64 spread over the
    file. Training changes nearly every number of each tensor that it changes, so that any fine-tune, quantization or
    damaged download of some size has another digest; a few changed bytes may not. It takes milliseconds.

    raises CheckpointError if the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        _sample(path, digest)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}. Check its permissions.") from None
    return digest.hexdigest()


def _sample(file: Path, digest: hashlib._Hash) -> None:
    with opened_ranges(file) as ranges:
        header, middles = _known_places(file) if file.suffix == ".safetensors" else (0, [])
        last = max(0, ranges.size - _SAMPLE_BYTES)
        spread = [last * number // (_SAMPLES - 1) for number in range(_SAMPLES)] if last else [0]
        digest.update(f"{ranges.size}\0".encode())
        samples = [(0, header), *((place, _SAMPLE_BYTES) for place in sorted({*spread, *middles}))]
        for sample in ranges.pread_all(samples):
            digest.update(sample)


def _known_places(file: Path) -> tuple[int, list[int]]:
    """Where the header of a safetensors file ends, and where a block in the middle of each tensor begins."""
    try:
        tensors = read_safetensors(file)
    except PolymergeError:  # whoever opens it says what is wrong; here it is a file like any other
        return 0, []
    middles = [tensor.start + max(0, tensor.nbytes - _SAMPLE_BYTES) // 2 for tensor in tensors if tensor.nbytes]
    return min((tensor.start for tensor in tensors), default=0), middles
