"""Run a reader on one input and judge what it did: a value, or an error that a person can use; nothing else."""

from __future__ import annotations

import json
import lzma
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, NoReturn

import polymerge
from paths import GOLDEN
from polymerge.errors import PolymergeError

__all__ = [
    "CANARY",
    "KEPT",
    "SECONDS",
    "Kind",
    "Verdict",
    "from_text",
    "judge",
    "kept_inputs",
    "limit_this_process",
    "to_text",
]

KEPT = GOLDEN / "fuzz" / "inputs.jsonl.xz"
"""Every input that ever failed, one a line."""

Files = Mapping[str, bytes]
"""An input: the files of a folder, by name."""

SECONDS = 5
"""Processor time that one input may take."""

MEMORY = 1 << 30
"""Bytes that one input may take."""

MOST_CHARACTERS = 4000
"""Of a message about one problem."""

CANARY = "fuzz.canary"
"""The event that code in an input raises when it runs."""

_OWN = str(Path(polymerge.__file__).parent)
_STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pty.spawn", "socket.connect",
           "socket.bind", "socket.getaddrinfo", "webbrowser.open", "os.startfile", CANARY)  # fmt: skip
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.truncate")


@dataclass(frozen=True)
class Kind:
    """One kind of inputs: how they are made, and what reads them.

    make   an input from a source of random numbers
    read   reads the files in a folder; what it returns is not looked at
    share  how many of a thousand inputs are of this kind
    """

    name: str
    make: Callable[[Random], Files]
    read: Callable[[Path], object]
    share: int = 20


@dataclass(frozen=True)
class Verdict:
    """What a reader did.

    failure  what was wrong with that; "" if nothing
    refused  whether it raised an error of polymerge
    seconds  of processor time
    peak     bytes that the process grew to beyond what it was before
    """

    failure: str
    refused: bool
    seconds: float
    peak: int


class _TooLong(BaseException):
    """An input has taken its time."""


class _Watch:
    """What the audit hook saw while an input was read; a hook cannot be taken back, so that it is told when to look."""

    def __init__(self) -> None:
        self.inside: str | None = None
        self.seen: list[str] = []
        self.hooked = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event.startswith(_STARTS):
            self.seen.append(f"{event}{arguments!r:.150}")
            raise PermissionError(f"{event} while an input is read")
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and bool({*"wax+"} & {*mode})) or (
                mode is None and isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            if writes:
                self._changes(event, path)
        elif event in _CHANGES:
            self._changes(event, arguments[1 if event in ("os.link", "os.symlink") else 0])

    def _changes(self, event: str, path: Any) -> None:
        if isinstance(path, int) or self.inside is None:
            return
        where = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 (a path object would cost more)
        # neither device keeps anything; numba keeps what it has compiled beside the source
        if not where.startswith((self.inside, "/dev/null", "/dev/full")) and "__pycache__" not in where:
            self.seen.append(f"{event}: {where}")


_WATCH = _Watch()


def limit_this_process() -> None:
    """Give this process, which does nothing but read inputs, its limit of memory and its watch."""
    if not _WATCH.hooked:
        sys.addaudithook(_WATCH)
        _WATCH.hooked = True
    now = next((int(line.split()[1]) << 10 for line in _status() if line.startswith("VmData")), None)
    if now is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (now + 3 * MEMORY, resource.RLIM_INFINITY))


def _stop(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise _TooLong


def judge(kind: Kind, files: Files, folder: Path, allowed: Path | None = None) -> Verdict:
    """Write an input to an empty folder, read it, and remove the folder; `allowed` is where a reader may write to."""
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    _WATCH.seen.clear()
    before, start = _reset_peak(), time.process_time()
    failure, refused = "", False
    try:
        with warnings.catch_warnings(), _watched(allowed or folder):
            warnings.simplefilter("error")
            kind.read(folder)
    except PolymergeError as error:
        refused = True
        failure = _of_message(error)
    except _TooLong:
        failure = f"takes more than {SECONDS} s {_where(sys.exc_info()[1])}"
    except AssertionError as error:
        failure = f"wrong: {error} {_where(error)}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        failure = f"{type(error).__name__}: {str(error)[:200]!r} {_where(error)}"
    seconds, peak = time.process_time() - start, max(_peak() - before, 0)
    if _WATCH.seen:
        failure = f"does what it must not: {'; '.join(dict.fromkeys(_WATCH.seen))[:600]}"
    if not failure and peak > MEMORY:
        failure = f"takes {peak >> 20} MiB"
    shutil.rmtree(folder, ignore_errors=True)
    return Verdict(failure, refused, seconds, peak)


@contextmanager
def _watched(allowed: Path) -> Iterator[None]:
    before = signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    _WATCH.inside = str(allowed)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        _WATCH.inside = None


def _of_message(error: PolymergeError) -> str:
    """What is wrong with the messages of an error: a terminal must be able to show each of them on a line."""
    for problem in error.problems:
        text = str(problem)
        try:
            text.encode()
        except UnicodeEncodeError:
            return f"message: no UTF-8: {text[:150]!r} {_where(error)}"
        control = next((one for one in text if unicodedata.category(one) == "Cc"), None)
        if control is not None:
            return f"message: holds {control!r}: {text[:150]!r} {_where(error)}"
        if len(text) > MOST_CHARACTERS:
            return f"message: has {len(text)} characters: {text[:100]!r} {_where(error)}"
    return ""


def _where(error: BaseException | None) -> str:
    """The innermost line of polymerge in a traceback."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    for frame in reversed(frames):
        if frame.filename.startswith(_OWN):
            return f"at {Path(frame.filename).relative_to(_OWN)}:{frame.lineno} in {frame.name}"
    last = frames[-1] if frames else None
    return f"at {Path(last.filename).name}:{last.lineno} in {last.name}" if last else ""


def _status() -> list[str]:
    status = Path("/proc/self/status")  # of Linux; elsewhere an input that takes too much is found by its peak alone
    return status.read_text(encoding="ascii", errors="replace").splitlines() if status.exists() else []


def _reset_peak() -> int:
    """Forget the largest memory so far, and return what is used now, in bytes."""
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:  # noqa: PTH123
        file.write("5")
    return _peak()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def kept_inputs() -> list[str]:
    """Every input that ever failed, as `to_text` writes them."""
    return lzma.decompress(KEPT.read_bytes()).decode().splitlines() if KEPT.exists() else []


def to_text(kind: str, files: Files, note: str = "") -> str:
    """An input as JSON, for a file that can be read and replayed: each byte is the character of its number."""
    data = {"kind": kind, "failed": note, "files": {name: data.decode("latin-1") for name, data in files.items()}}
    return json.dumps(data, indent=1, ensure_ascii=True) + "\n"


def from_text(text: str) -> tuple[str, dict[str, bytes]]:
    """The kind and the files of an input that `to_text` wrote."""
    data = json.loads(text)
    return data["kind"], {name: held.encode("latin-1") for name, held in data["files"].items()}
