"""Run a command and measure it: wall time of the whole process, peak memory of it and its children."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Measured", "RunError", "machine", "measure", "settle"]

INTERVAL = 0.01
MIB = 1 << 20


class RunError(Exception):
    """A command did not do what it was run for."""


@dataclass(frozen=True)
class Measured:
    """What one run took.

    seconds     wall time from start to end, the interpreter's start and imports included
    cpu         seconds of all processors together, in the program and in the system for it
    blind       the longest time in which memory was not looked at, in seconds: where it is long, a peak may be missed
    anonymous   the most anonymous memory at any one time, in bytes: what has to be there, and cannot be dropped
    resident    the most resident memory at any one time, in bytes: with the pages of mapped files
    """

    seconds: float
    cpu: float
    blind: float
    anonymous: int
    resident: int


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Measured:
    """Run a command to its end; raises RunError, with the end of what it printed, where it fails."""
    before, start = _cpu_of_children(), time.perf_counter()
    try:
        process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except OSError as error:
        raise RunError(f"{command[0]}: {error.strerror}") from None
    sampler = _Sampler(process.pid)
    sampler.start()
    try:
        printed = process.communicate()[0]
        seconds = time.perf_counter() - start
    finally:
        process.kill()
        sampler.stop()
    if process.returncode:
        raise RunError(
            f"{' '.join(command)} ended with {process.returncode}:\n{printed.decode(errors='replace')[-2000:]}"
        )
    return Measured(seconds, _cpu_of_children() - before, sampler.blind, sampler.anonymous, sampler.resident)


def settle(limit: int = 32 * MIB, patience: float = 60.0) -> None:
    """Have the system write out what waits to be written, so that nothing of the last run slows down the next one."""
    os.sync()
    end = time.monotonic() + patience
    while sum(_fields(Path("/proc/meminfo"), "Dirty", "Writeback")) > limit and time.monotonic() < end:
        time.sleep(0.1)


def machine() -> dict[str, str]:
    """What the numbers depend on: processor, cores, memory, system."""
    model = "unknown processor"
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return {
        "processor": model,
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{_fields(Path('/proc/meminfo'), 'MemTotal')[0] / (1 << 30):.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "load": f"{os.getloadavg()[0]:.2f}",
    }


class _Sampler(threading.Thread):
    """Looks at a process and its descendants again and again, and keeps the largest sums."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._ended = pid, threading.Event()
        self.anonymous = self.resident = 0
        self.blind, self._last = 0.0, time.perf_counter()

    def run(self) -> None:
        while not self._ended.wait(INTERVAL):
            self._note_time()
            now = [_fields(Path(f"/proc/{pid}/status"), "RssAnon", "VmRSS") for pid in _family(self._pid)]
            self.anonymous = max(self.anonymous, sum(anonymous for anonymous, _ in now))
            self.resident = max(self.resident, sum(resident for _, resident in now))

    def stop(self) -> None:
        self._ended.set()
        self.join()
        self._note_time()

    def _note_time(self) -> None:
        now = time.perf_counter()
        self.blind, self._last = max(self.blind, now - self._last), now


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _family(pid: int) -> list[int]:
    """A process and all of its descendants, as far as they have not ended."""
    found = [pid]
    for parent in found:  # grows while it is gone through
        with suppress(OSError):
            for children in Path(f"/proc/{parent}/task").glob("*/children"):
                found += map(int, children.read_text(encoding="ascii").split())
    return found


def _fields(file: Path, *names: str) -> list[int]:
    """Some of the sizes in a file of /proc, in bytes; zeros where it has gone."""
    fields: dict[str, str] = {}
    with suppress(OSError):
        fields = dict(line.split(":", 1) for line in file.read_text(encoding="utf-8").splitlines() if ":" in line)
    return [1024 * int(fields[name].split()[0]) if name in fields else 0 for name in names]
