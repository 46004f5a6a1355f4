"""Whether files are still what they were: their sha256, remembered so that it is computed once, and cheap stamps."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

__all__ = ["Stamp", "file_digest", "sha256_of", "stamps_of"]

Stamp: TypeAlias = "tuple[int, int] | None"
"""Size of a file in bytes and when it was written, in nanoseconds; None for one that is not here."""

_CHUNK = 1 << 22


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal.

    The hub's cache names large files by their sha256, which is taken as it is. Another file's digest is kept in the
    user's cache folder under its path, size, inode and time of change, and computed again when one of them differs.
    """
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name
    stat = real.stat()
    seen = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    note = _notes() / f"{hashlib.sha256(os.fsencode(real)).hexdigest()}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(note.read_text(encoding="utf-8"))
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
    """What tells, without a look at their content, whether files were written since."""
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
    """The sha256 of a file's bytes, read now, in hexadecimal."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def _notes() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "polymerge" / "sha256"
