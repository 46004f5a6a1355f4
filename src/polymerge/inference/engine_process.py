"""An engine in a process of its own, in whatever environment: started, sent messages, ended."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from polymerge.errors import shown
from polymerge.inference.answering import EngineError
from polymerge.inference.engines import ENGINES, environ_of, host_of
from polymerge.inference.hosts import engine_host
from polymerge.inference.hosts.engine_host import read_message, write_message
from polymerge.paths import python_in

__all__ = ["EngineProcess", "RequestRefusedError"]

_PATIENCE: Final = 10.0  # seconds for an engine to end by itself
_TOLD: Final = 1500  # characters of an engine's message
_AGAIN: Final = "Answers are kept: run again to go on"


class RequestRefusedError(Exception):
    """The engine refuses a request, and is as it was before."""


class EngineProcess:
    """A process that runs an engine, by its environment's Python; it needs no polymerge there.

    engine       a row of the table of engines
    environment  the folder of a virtual environment, or its Python; empty for the current one
    settings     as the file in `hosts` takes them

    raises EngineError if the engine does not start.
    """

    def __init__(self, engine: str, environment: str, settings: Mapping[str, Any]) -> None:
        self._engine, self._lock = engine, threading.Lock()
        log, name = tempfile.mkstemp(prefix=f"polymerge-{engine}-", suffix=".log")
        self._log = Path(name)
        self._process = subprocess.Popen(
            [python_in(environment or None), engine_host.__file__, str(host_of(engine))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environ_of(environment),
            start_new_session=True,  # a ^C is for this process, which ends the other
        )
        os.close(log)
        try:
            self.about: dict[str, Any] = self.call("start", settings)
        except RequestRefusedError as error:  # cannot be
            raise EngineError(str(error)) from None
        except BaseException:
            self.close(keep_log=True)
            raise

    def call(self, op: str, message: Mapping[str, Any], blobs: Sequence[Any] = ()) -> dict[str, Any]:
        """Call a method of the engine, and return its reply.

        raises RequestRefusedError if it refuses, EngineError if it fails, or has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            try:
                write_message(self._process.stdin, {"op": op, **message}, blobs)
                reply, _ = read_message(self._process.stdout)
            except (EOFError, OSError):
                raise self._ended() from None
        if "refused" in reply:
            raise RequestRefusedError(reply["refused"])
        if "failed" in reply:
            doing = "does not load the model" if op == "start" else "failed"
            again = "" if op == "start" else f" {_AGAIN}."
            raise EngineError(
                f"{self._engine} {doing}: {_shortened(reply['failed'])}.{again} All it said is in {self._log}"
            )
        done: dict[str, Any] = reply["done"]
        return done

    def close(self, keep_log: bool = False) -> None:
        """End the process, and whatever it has started."""
        process = self._process
        if process.stdin is not None and not process.stdin.closed:
            with suppress(OSError):  # it has ended before
                process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        if not keep_log and not process.returncode:
            self._log.unlink(missing_ok=True)

    def _ended(self) -> EngineError:
        try:
            status: Any = self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            status = "unknown"
        how = f"signal {-status}" if isinstance(status, int) and status < 0 else f"exit status {status}"
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = f", last said: {shown(lines[-1])}" if lines else ""
        package = ENGINES[self._engine].package
        return EngineError(f"{package} has ended ({how}{last}). {_AGAIN}. All it said is in {self._log}")


def _shortened(text: str) -> str:
    """A message on one line, with its beginning and its end where it is long."""
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= _TOLD else f"{line[: 2 * _TOLD // 3]} [...] {line[-_TOLD // 3 :]}"
