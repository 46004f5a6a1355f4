"""A program in a process of its own, in whatever environment: started, sent messages, ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

from polymerge.errors import RecipeError, shown
from polymerge.inference.programs import program_host
from polymerge.inference.programs.program_host import read_message, write_message
from polymerge.paths import python_in

__all__ = ["ProgramFailedError", "ProgramProcess", "RequestRefusedError", "program_file", "versions_in"]

_PATIENCE: Final = 10.0  # seconds for a program to end by itself
_TOLD: Final = 1500  # characters of a program's message
_LAST: Final = 3  # lines of a log
_OF_THIS_PYTHON: Final = ("PYTHONPATH", "PYTHONHOME")

_VERSIONS: Final = """
import json, sys
from importlib import metadata, util
found = {}
for name in sys.argv[1:]:
    if util.find_spec(name) is not None:
        package = metadata.packages_distributions().get(name, [name])[0]
        try:
            found[name] = metadata.version(package) + ("" if package == name else f" ({package})")
        except metadata.PackageNotFoundError:
            found[name] = ""
print(json.dumps(found))
"""


class RequestRefusedError(Exception):
    """The program refuses a request, and is as it was before."""


class ProgramFailedError(Exception):
    """The program failed, or has ended: what it said, and where all of that is."""


class ProgramProcess:
    """A process that runs one of the files in this folder by an environment's Python; it needs no polymerge there.

    name         of the program, in errors and in the name of its log
    environment  the folder of a virtual environment, or its Python; empty for the current one
    """

    def __init__(self, name: str, environment: str, file: Path) -> None:
        self.name, self._lock = name, threading.Lock()
        log, path = tempfile.mkstemp(prefix=f"polymerge-{name}-", suffix=".log")
        self._log, python = Path(path), python_in(environment or None)
        self._process = subprocess.Popen(
            [python, program_host.__file__, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_variables(python),
            start_new_session=True,  # a ^C is for this process, which ends the other
        )
        os.close(log)

    def call(self, op: str, message: Mapping[str, Any], blobs: Sequence[Any] = ()) -> dict[str, Any]:
        """Call a function of the program, and return its reply.

        raises RequestRefusedError if it refuses, ProgramFailedError if it fails, or has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            try:
                write_message(self._process.stdin, {"op": op, **message}, blobs)
                reply, _ = read_message(self._process.stdout)
            except (EOFError, OSError):
                raise ProgramFailedError(f"it has ended ({self._end()}). {self._all_said}") from None
        if "refused" in reply:
            raise RequestRefusedError(reply["refused"])
        if "failed" in reply:
            raise ProgramFailedError(f"{_shortened(reply['failed'])}. {self._all_said}")
        done: dict[str, Any] = reply["done"]
        return done

    def close(self, patience: float = _PATIENCE) -> None:
        """End the process, and whatever it has started; its log is kept where it failed.

        patience  seconds for it to end by itself
        """
        process = self._process
        if process.stdin is not None and not process.stdin.closed:
            with suppress(OSError):  # it has ended before
                process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        if not process.returncode:
            self._log.unlink(missing_ok=True)

    @property
    def _all_said(self) -> str:
        return f"All it said is in {self._log}"

    def _end(self) -> str:
        """How the process has ended, and what it said last."""
        try:
            status: Any = self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            status = "unknown"
        how = f"signal {-status}" if isinstance(status, int) and status < 0 else f"exit status {status}"
        lines = [line for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return f"{how}, last said: {shown(' | '.join(lines[-_LAST:]), 600)}" if lines else how


def program_file(name: str) -> Path:
    """The file of that name that a program's Python runs."""
    return Path(__file__).with_name(name)


@cache
def versions_in(environment: str, names: tuple[str, ...]) -> Mapping[str, str]:
    """The versions of those modules that an environment has, by name, without importing them.

    environment  as of a `ProgramProcess`

    raises RecipeError where its Python does not run.
    """
    python = python_in(environment or None)
    asked = subprocess.run(
        [python, "-c", _VERSIONS, *names],
        capture_output=True, text=True, cwd="/", check=False, stdin=subprocess.DEVNULL, env=_variables(python),
    )  # fmt: skip
    if asked.returncode:
        told = (asked.stderr.strip().splitlines() or [f"exit status {asked.returncode}"])[-1]
        raise RecipeError(f"environment {environment}: its Python does not run: {told}")
    found: dict[str, str] = json.loads(asked.stdout)
    return found


def _variables(python: str) -> dict[str, str]:
    """The variables of a program: what this Python is told to import is nothing to another one."""
    own = python == sys.executable
    return {name: value for name, value in os.environ.items() if own or name not in _OF_THIS_PYTHON}


def _shortened(text: str) -> str:
    """A message on one line, with its beginning and its end where it is long."""
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= _TOLD else f"{line[: 2 * _TOLD // 3]} [...] {line[-_TOLD // 3 :]}"
