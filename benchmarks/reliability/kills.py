"""Kill small merges at random moments, and at every call by which they change files."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator
from pathlib import Path

from children import Child, Ended
from scenarios import Known, Place
from verdicts import HarnessError, Tally, forced, judge

_RETRIED = ("EIO", "ENOSPC", "EINTR")
ERRORS = {
    "openat": _RETRIED,
    "mkdir": ("EIO", "ENOSPC"),
    "rename": ("EIO", "ENOSPC"),
    "renameat": ("EIO", "ENOSPC"),
    "renameat2": ("EIO", "ENOSPC", "EINVAL", "ENOSYS"),
    "fsync": _RETRIED,
    "fdatasync": _RETRIED,
    "sync_file_range": ("EIO",),
    "fallocate": (*_RETRIED, "EOPNOTSUPP"),
    "ftruncate": ("EIO", "ENOSPC"),
    "write": _RETRIED,
    "pwrite64": _RETRIED,
    "copy_file_range": ("EIO", "ENOSPC"),
    "sendfile": ("EIO", "ENOSPC"),
    "flock": ("EIO", "ENOLCK", "EINTR"),
    "link": ("EIO",),
    "symlink": ("EIO",),
    "unlink": ("EIO",),
    "unlinkat": ("EIO",),
    "rmdir": ("EIO",),
    "close": ("EIO",),
}
"""The calls that change files or their names, with the errors that a system may answer each with."""

_FEW = 15
"""Where a call is made more often than this, the errors take turns."""

HARMLESS = {("fsync", "EINTR"), ("fdatasync", "EINTR"), ("fallocate", "EINTR"),
            ("write", "EINTR"), ("pwrite64", "EINTR"), ("flock", "EINTR"), ("renameat2", "EINVAL"),
            ("renameat2", "ENOSYS"), ("fallocate", "EOPNOTSUPP")}  # fmt: skip
"""What a program has to get over: calls to be made again, and calls that a filesystem need not have."""


Judge = Callable[[Place, Known, Ended, Tally, str], None]
"""Counts what a fault has left, and has the command put it right; the last is where the fault was."""


def at_random(place: Place, known: Known, count: int, seed: int, judge: Judge = judge) -> Tally:
    """Kill a command at moments spread evenly over its time."""
    tally = Tally("kills", "at random", place.scenario.name)
    moments = random.Random(f"{seed} {place.scenario.name}")
    usual = sorted(_undisturbed(place).seconds for _ in range(5))[2]
    while tally.runs < count:
        place.reset()
        child = Child(place.words(*forced(place.scenario)), place.scenario.prepare)
        moment = moments.uniform(0, 1.1 * usual)
        child.go()
        time.sleep(moment)
        child.kill()
        ended = child.wait()
        tally.outcomes["done before"] += ended.status == 0
        judge(place, known, ended, tally, f"killed after {moment / usual:.0%} of its time")
    return tally


def _undisturbed(place: Place) -> Ended:
    place.reset()
    child = Child(place.words(*forced(place.scenario)), place.scenario.prepare)
    child.go()
    return child.wait()


def at_every_call(
    place: Place, known: Known, errors: bool, judge: Judge = judge, only: Container[str] = ERRORS
) -> Tally:
    """Kill a command at every call that changes files beside its inputs, or have each such call fail.

    only  the names of the calls
    """
    tally = Tally(*("faults", "errors") if errors else ("kills", "at every call"), place.scenario.name)
    calls = [call for call in _calls(place) if call[0] in only]
    tally.note = ", ".join(f"{count} {call}" for call, count in sorted(Counter(call for call, _ in calls).items()))
    frequent = [call for call, count in Counter(call for call, _ in calls).items() if count > _FEW]
    for call, number in calls:
        faults = ERRORS[call] if errors else ("KILL",)
        for fault in faults if call not in frequent else (faults[number % len(faults)],):
            place.reset()
            told = f"signal={fault}" if fault == "KILL" else f"error={fault}"
            ended = _traced(place, "-o", "/dev/null", "-e", f"inject={call}:{told}:when={number}")
            at = f"{fault} at {call} {number}"
            judge(place, known, ended, tally, at)
            if (call, fault) in HARMLESS and ended.status:
                tally.wrong[f"{place.scenario.name}, {at}: status {ended.status}: {ended.said.strip()[-200:]}"] += 1
    return tally


def _traced(place: Place, *options: str) -> Ended:
    """Run a scenario under strace, which holds on to it before it begins."""
    child = Child(place.words(*forced(place.scenario)), place.scenario.prepare)
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-e", f"trace={','.join(ERRORS)}", *options, "-p", str(child.pid)],
        stderr=subprocess.PIPE,
    )
    status = Path(f"/proc/{child.pid}/status")
    deadline = time.monotonic() + 20
    while "TracerPid:\t0" in status.read_text(encoding="ascii"):
        if tracer.poll() is not None or time.monotonic() > deadline:
            child.kill()
            child.wait()
            raise HarnessError(f"strace cannot trace: {tracer.communicate()[1].decode()}")
        time.sleep(0.001)
    time.sleep(0.005)  # between taking hold of the process and stopping it
    child.go()
    ended = child.wait()
    tracer.communicate()
    return ended


def _calls(place: Place) -> list[tuple[str, int]]:
    """The calls beside the inputs, each with its number among the calls of its name in its thread."""
    place.reset()
    with tempfile.TemporaryDirectory() as folder:
        ended = _traced(place, "-y", "-ff", "-o", f"{folder}/calls")
        if ended.status:
            raise HarnessError(f"{place.scenario.name}: under strace it ended with {ended.status}: {ended.said}")
        return sorted({call for file in Path(folder).iterdir() for call in _of_interest(file, str(place.beside))})


def _of_interest(file: Path, beside: str) -> Iterator[tuple[str, int]]:
    counts: Counter[str] = Counter()
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if (found := re.match(r"(\w+)\(", line)) is not None:
            counts[found[1]] += 1
            if f"{beside}/" in line or f"{beside}>" in line or f'{beside}"' in line:
                yield found[1], counts[found[1]]


def why_not() -> str:
    """Why calls cannot be made to fail here, or nothing."""
    return "" if shutil.which("strace") else "strace is not installed"
