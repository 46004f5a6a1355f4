"""Run the command line in forks of a process that has imported everything, so that a thousand runs take minutes."""

from __future__ import annotations

import io
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from polymerge.cli import main

Prepare = Callable[[], None]
"""What a child does before it runs the command, such as to make a function of the system fail."""

TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status, negative for a signal, what it printed, and the seconds it took."""

    status: int
    said: str
    seconds: float


class Child:
    """A command line that waits in a process of its own until it is told to go."""

    def __init__(self, words: Sequence[str], prepare: Prepare | None = None, folder: Path | None = None) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed by wait)
        waits, self._gate = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._gate)
            self._run(words, waits, prepare, folder)
        os.close(waits)
        self._start = time.monotonic()

    def _run(self, words: Sequence[str], waits: int, prepare: Prepare | None, folder: Path | None) -> NoReturn:
        status = 70
        try:
            for stream in (1, 2):
                os.dup2(self._said.fileno(), stream)
            if folder is not None:
                os.chdir(folder)
            if prepare is not None:
                prepare()
            sys.argv = list(words)
            os.read(waits, 1)
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def go(self) -> None:
        """Let the command begin."""
        self._start = time.monotonic()
        os.write(self._gate, b"!")

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> Ended:
        """Wait for the end."""
        _, status = os.waitpid(self.pid, 0)
        seconds = time.monotonic() - self._start
        os.close(self._gate)
        with self._said as file:
            file.seek(0)
            said = file.read().decode(errors="replace")
        return Ended(os.waitstatus_to_exitcode(status), said, seconds)


def warm_up(words: Sequence[str]) -> None:
    """Run a command line in this process, whose forks then have all that it imports and compiles."""
    before = sys.argv, signal.getsignal(signal.SIGTERM)
    try:
        sys.argv = list(words)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), suppress(SystemExit):
            main()
    finally:
        sys.argv = before[0]
        signal.signal(signal.SIGTERM, before[1])


def run(words: Sequence[str], prepare: Prepare | None = None, folder: Path | None = None) -> Ended:
    """Run a command line to its end."""
    child = Child(words, prepare, folder)
    child.go()
    return child.wait()
