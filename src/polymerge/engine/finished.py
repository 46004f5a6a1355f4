"""What a killed run has finished: noted as it comes, and kept if the next run would make the same bits.

A line of the journal names a matrix, the sha256 of its bytes, and the state of the files that it was read from. Nothing
is trusted beyond that: what lies in the unfinished output is read and its sha256 compared, so that bytes that a kill or
a power cut kept from the disk are computed again.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
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
from polymerge.recipe.parameters import Setting

__all__ = ["Finished", "Journal", "said_with", "state_of", "version_of", "what_decides"]


class Journal:
    """What a run has finished, noted as it comes in a file, from which a later run of the same key goes on.

    file  which need not be there

    `taken` counts what was found to be finished.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._lock, self.taken = file, Lock(), 0
        self._known: dict[tuple[str | int, ...], list[Any]] = {}
        with suppress(FileNotFoundError):
            for line in read_bounded(file, RECORDS_BYTES).splitlines():
                with suppress(ValueError, TypeError):  # the last line of a run that was killed may be cut off
                    name, *said = json.loads(line)
                    self._known[tuple(name)] = said

    def __bool__(self) -> bool:
        """Whether an earlier run has noted anything."""
        return bool(self._known)

    def said(self, *name: str | int) -> list[Any]:
        """What is noted under a name; empty if nothing is."""
        return self._known.get(name, [])

    def digest(self, name: tuple[str | int, ...], state: str) -> str | None:
        """The sha256 of what an earlier run has written, of files in this state; None if none has."""
        digest, *of = self.said(*name) or ("",)
        return digest if state and of == [state] else None

    def take(self) -> None:
        """Count something that is finished already."""
        with self._lock:
            self.taken += 1

    def note(self, name: tuple[str | int, ...], *said: Any) -> None:
        """Note that something is finished, and what has to be known of it."""
        line = json.dumps([name, *said]).encode()
        with self._lock, self._file.open("ab", buffering=0) as file:
            file.write(b"\n" + line)  # after what a killed run may have written of its last line


@dataclass(frozen=True)
class Finished:
    """The matrices of an output that a run has finished.

    shards   the files of the output, which lie in `folder`
    """

    journal: Journal
    folder: Path
    shards: Shards

    def stored(self, step: Step) -> TensorInfo:
        """Where the tensor of a step lies in the output."""
        place = self.shards.places[step.name]
        return TensorInfo(
            step.name, step.dtype, step.shape, self.folder / self.shards.names[place.shard], place.start, step.size
        )


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
    headers = {
        name: hashlib.sha256(header).hexdigest() for name, header in zip(shards.names, shards.headers, strict=True)
    }
    return said_with(device, plan.settings, plan=plan.hash, files=headers)


def said_with(device: str = "cpu", settings: Iterable[Setting] = (), **what: Any) -> str:
    """A text of what decides a result, and of all beside it that bits follow from: versions, linear algebra, methods.

    settings  whose methods count if they work on whole matrices
    """
    rows = {setting.method: setting.row for setting in settings if setting.whole}
    packages = ("polymerge", "numpy", "scipy", *(("torch",) if device != "cpu" else ()))
    libraries = [
        {name: library.get(name) for name in ("internal_api", "version", "architecture", "threading_layer")}
        for library in threadpool_info()
        if library.get("user_api") == "blas" and "numpy" in str(library.get("filepath"))
    ]
    beside = {
        "device": device,
        "versions": {package: found for package in packages if (found := version_of(package))},
        "linear algebra": sorted(libraries, key=str),
        "methods": {name: _source(method_function(row)) for name, row in rows.items()},
    }
    return json.dumps({**what, **beside}, indent=1, sort_keys=True)


def version_of(package: str) -> str:
    """The version of an installed package; empty if it is not installed."""
    with suppress(PackageNotFoundError):  # eigenvectors are SciPy's where it is installed
        return version(package)
    return ""


def _source(function: Callable[..., Any]) -> str:
    """The sha256 of the file that a function is written in: one of the user's own may change between two runs."""
    file = None
    with suppress(TypeError):  # one that is compiled
        file = inspect.getsourcefile(function)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
