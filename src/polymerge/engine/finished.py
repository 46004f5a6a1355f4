"""Matrices that a killed run has finished: noted as they come, and kept if the next run would make the same bits.

A line of the journal names a matrix, the sha256 of its bytes in the output, and the state of the files that it was read
from. Nothing is trusted beyond that: what lies in the unfinished output is read and its sha256 compared, so that bytes
that a kill or a power cut kept from the disk are computed again.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

from threadpoolctl import threadpool_info

from polymerge.checkpoints import TensorInfo
from polymerge.checkpoints.bounds import RECORDS_BYTES, read_bounded
from polymerge.checkpoints.identity import YOUNG, stamps_of
from polymerge.checkpoints.prefetch import fetched
from polymerge.checkpoints.writer import Shards
from polymerge.methods.method import method_function
from polymerge.planning import Plan, Step
from polymerge.planning.matrix_costs import decomposed

__all__ = ["Finished", "state_of", "what_decides"]

Name = tuple[str, str, int]
"""A matrix: its tensor's name in the output, the canonical name of its rows, and its number among those; or a whole
file of the output, by its own name (`on_ray`)."""


class Finished:
    """The journal of a run, which goes on where an earlier one of the same key ended.

    journal  its file, which need not be there
    shards   the files of the output, which lie in `folder`

    `taken` counts the matrices that were found to be finished.
    """

    def __init__(self, journal: Path, folder: Path, shards: Shards) -> None:
        self._journal, self._folder, self._shards = journal, folder, shards
        self._lock = Lock()
        self.taken = 0
        self._known: dict[Name, tuple[str, str]] = {}
        with suppress(FileNotFoundError):
            for line in read_bounded(journal, RECORDS_BYTES).splitlines():
                with suppress(ValueError, TypeError):  # the last line of a run that was killed may be cut off
                    tensor, canonical, number, digest, state = json.loads(line)
                    self._known[tensor, canonical, number] = digest, state

    def stored(self, step: Step) -> TensorInfo:
        """Where the tensor of a step lies in the output."""
        place = self._shards.places[step.name]
        return TensorInfo(
            step.name, step.dtype, step.shape, self._folder / self._shards.names[place.shard], place.start, step.size
        )

    def digest(self, name: Name, state: str) -> str | None:
        """The sha256 of a matrix that an earlier run has written, from files in this state; None if none has."""
        digest, of = self._known.get(name, (None, ""))
        return digest if of == state else None

    def take(self) -> None:
        """Count a matrix that is finished already."""
        with self._lock:
            self.taken += 1

    def note(self, name: Name, digest: str, state: str) -> None:
        """Note that a matrix has been written, from files in this state."""
        line = json.dumps([*name, digest, state]).encode()
        with self._lock, self._journal.open("ab", buffering=0) as file:
            file.write(b"\n" + line)  # after what a killed run may have written of its last line


def state_of(files: Iterable[Path]) -> str:
    """What tells the state of files; empty if they are so young that a change could leave no trace."""
    found = sorted(dict.fromkeys(files))
    for file in found:
        fetched(file)
    stamps = stamps_of(found)
    newest = max((max(stamp.modified, stamp.changed) for stamp in stamps.values() if stamp), default=0)
    if len(stamps) < len(found) or None in stamps.values() or time.time_ns() - newest < YOUNG:
        return ""
    told = json.dumps([[str(file), *(stamps[file] or ())] for file in found])
    return hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()


def what_decides(plan: Plan, shards: Shards, device: str, *, always: bool = False) -> str:
    """All but the content of the inputs that the bits of a plan's tensors, and their places, follow from.

    returns  a text, which is empty where no method works on matrices, unless it is asked for `always`
    """
    if not always and not any(decomposed(plan)):
        return ""
    rows = {setting.method: setting.row for setting in plan.settings if setting.whole}
    packages = ("polymerge", "numpy", *(("torch",) if device != "cpu" else ()))
    libraries = [
        {name: library.get(name) for name in ("internal_api", "version", "architecture", "threading_layer")}
        for library in threadpool_info()
        if library.get("user_api") == "blas" and "numpy" in str(library.get("filepath"))
    ]
    headers = {
        name: hashlib.sha256(header).hexdigest() for name, header in zip(shards.names, shards.headers, strict=True)
    }
    return json.dumps(
        {
            "plan": plan.hash,
            "files": dict(zip(shards.names, headers, strict=True)),
            "device": device,
            "versions": {package: version(package) for package in packages},
            "linear algebra": sorted(libraries, key=str),
            "methods": {name: _source(method_function(row)) for name, row in rows.items()},
        },
        indent=1,
        sort_keys=True,
    )


def _source(function: Callable[..., Any]) -> str:
    """The sha256 of the file that a function is written in: one of the user's own may change between two runs."""
    file = None
    with suppress(TypeError):  # one that is compiled
        file = inspect.getsourcefile(function)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
