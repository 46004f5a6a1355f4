"""Run many inputs in processes of their own, and gather the verdicts; a process that dies or hangs is a failure too.

Each input follows from the seed, its kind and its number alone. A worker reads tasks from its standard input, one JSON
list a line, and answers each with a line; the input that it is at stands in a file, by which one that hangs is known.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from random import Random
from typing import Any

from fuzz_kinds import KINDS
from fuzz_seeds import SEEDS, build_seeds

__all__ = ["Failure", "Tally", "input_of", "random_of", "run"]

HANGS = 60
"""Seconds of processor time after which one input, or the start of a worker, counts as hanging."""

SLEEPS = 900
"""Seconds after which an input counts as hanging whatever it does; a busy machine may leave a worker without any."""

CHUNK = 250
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Failure:
    """An input that a reader did not bear: its kind, seed and number, and what happened."""

    kind: str
    seed: int
    number: int
    what: str


@dataclass
class Tally:
    """What came of the inputs of one kind: how many were accepted and refused, the slowest in seconds, the largest in
    bytes.
    """

    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    peak: int = 0
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        """All of them."""
        return self.accepted + self.refused + len(self.failures)


def random_of(kind: str, seed: int, number: int) -> Random:
    """The source of random numbers of one input."""
    return Random(f"{seed}/{kind}/{number}")


def input_of(kind: str, seed: int, number: int) -> dict[str, bytes]:
    """An input again, from its seed and number."""
    return dict(KINDS[kind].make(random_of(kind, seed, number)))


def run(
    inputs: int,
    seed: int,
    kinds: Sequence[str],
    jobs: int,
    seconds: float | None = None,
    told: Callable[[dict[str, Tally]], None] = lambda _: None,
) -> dict[str, Tally]:
    """Make and judge so many inputs of all kinds together, by their shares, in `jobs` processes.

    seconds  stop after that time, whatever is left
    told     called now and then with what there is
    """
    weight = [KINDS[kind].share for kind in kinds]
    counts = {kind: -(-inputs * one // sum(weight)) for kind, one in zip(kinds, weight, strict=True)}
    tasks: Queue[tuple[str, int, int]] = Queue()
    rounds = [
        (first / counts[kind], kind, first, min(CHUNK, counts[kind] - first))
        for kind in kinds
        for first in range(0, counts[kind], CHUNK)
    ]
    for _, kind, first, count in sorted(rounds):  # every kind advances alike, so that a run may be stopped
        tasks.put((kind, first, count))
    tallies = {kind: Tally() for kind in kinds}
    lock, until = threading.Lock(), None if seconds is None else time.monotonic() + seconds
    with tempfile.TemporaryDirectory(dir=_memory(), prefix="polymerge-fuzz-") as scratch:
        build_seeds(Path(scratch) / "seeds")
        threads = [
            threading.Thread(target=_serve, args=(Path(scratch) / str(job), seed, tasks, tallies, lock, until, told))
            for job in range(jobs)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return tallies


def _memory() -> str | None:
    """A folder in memory, where the machine has one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _serve(
    scratch: Path,
    seed: int,
    tasks: Queue[tuple[str, int, int]],
    tallies: dict[str, Tally],
    lock: threading.Lock,
    until: float | None,
    told: Callable[[dict[str, Tally]], None],
) -> None:
    """Hand tasks to one worker until there are none; start another where it has died."""
    scratch.mkdir()
    worker: _Worker | None = None
    try:
        while until is None or time.monotonic() < until:
            try:
                kind, first, count = tasks.get_nowait()
            except Empty:
                return
            worker = worker or _Worker(scratch)
            answer = worker.ask(kind, seed, first, count)
            with lock:
                tally = tallies[kind]
                if answer is None:
                    number, what = worker.end()
                    worker = None
                    tally.failures.append(Failure(kind, seed, number, what))
                    tasks.put((kind, number + 1, first + count - number - 1))
                    # what the dead one had counted of this task is counted as refused
                    tally.refused += number - first
                else:
                    tally.accepted += answer["accepted"]
                    tally.refused += answer["refused"]
                    tally.seconds += answer["seconds"]
                    tally.slowest = max(tally.slowest, answer["slowest"])
                    tally.peak = max(tally.peak, answer["peak"])
                    tally.failures += [Failure(kind, seed, number, what) for number, what in answer["failures"]]
                told(tallies)
    finally:
        if worker is not None:
            worker.close()
        shutil.rmtree(scratch, ignore_errors=True)


class _Worker:
    """A process that reads inputs."""

    def __init__(self, scratch: Path) -> None:
        self.now = scratch / "now"
        self.now.write_text("0")
        self.log = (scratch / "stderr").open("w+b")
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        paths = os.pathsep.join((str(_HERE), *filter(None, (os.environ.get("PYTHONPATH"),))))
        own = {
            "PYTHONPATH": paths,
            SEEDS: str(scratch.parent / "seeds"),
            "XDG_CACHE_HOME": str(scratch / "cache"),
            "HF_HUB_OFFLINE": "1",
            "NO_COLOR": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(_HERE / "fuzz_worker.py"), str(scratch)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env={**os.environ, **threads, **own},
        )  # fmt: skip

    def ask(self, *task: object) -> dict[str, Any] | None:
        """The answer to a task; None if the worker has died or hangs."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(task).encode() + b"\n")
            self.process.stdin.flush()
        seen, since, used = "", time.monotonic(), 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not selector.select(1):
                now = self.now.read_text()
                if now != seen:
                    seen, since, used = now, time.monotonic(), self._used()
                if self._used() - used > HANGS or time.monotonic() - since > SLEEPS:
                    return None
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def _used(self) -> float:
        """Seconds of processor time that the worker has used, where the system tells; 0 elsewhere."""
        with suppress(OSError, IndexError):
            fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return 0.0

    def end(self) -> tuple[int, str]:
        """The number of the input that the worker was at, and how it ended; one that hangs is killed."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        hangs = self.process.poll() is None
        self.log.seek(0)
        last = self.log.read().decode("utf-8", "replace").strip().splitlines()[-1:] or [""]
        self.close()
        what = "hangs" if hangs else f"the process ends with {self.process.returncode}"
        return int(self.now.read_text() or 0), f"{what} {last[0][:200]}"

    def close(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.communicate()
        self.log.close()
