"""The two tools that `families.py` compares: polymerge, and mergekit under several hash seeds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock

from measure import RunError

Tool = Callable[..., tuple[int, str]]
"""Merges: recipe, place of the output, options -> exit status and what was printed."""

Tools = Mapping[str, Mapping[int | None, Tool]]
"""By name, a tool under each of its hash seeds."""

SEEDS = (0, 1, 2)
ASKED_FOR = ("--allow-crimes", "--trust-remote-code")
"""What mergekit may ask for: models of two architectures, code from a checkpoint."""

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

SERVER = """
import importlib.metadata, json, os, sys, traceback
(entry,) = importlib.metadata.entry_points(group="console_scripts", name="mergekit-yaml")
main = entry.load()
for line in sys.stdin:
    words, log = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.argv, status = ["mergekit-yaml", *words], 1
        try:
            status = main() or 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status if isinstance(status, int) else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs the command `mergekit-yaml` in forks of a process that has imported it: imports take longer than tiny merges."""


class Mergekit:
    """mergekit's command under one hash seed, one merge at a time."""

    def __init__(self, environment: Path, seed: int) -> None:
        self._free = Lock()
        self._code = tempfile.TemporaryDirectory()  # where it copies the code that it runs
        command = [str(environment / "bin" / "python"), "-c", SERVER]
        said = {**os.environ, **ENVIRONMENT, "PYTHONHASHSEED": str(seed), "HF_MODULES_CACHE": self._code.name}
        self._server = subprocess.Popen(
            command, env=said, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def __call__(self, recipe: Path, out: Path, *options: str) -> tuple[int, str]:
        """Merge: exit status and what was printed."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        log = recipe.with_suffix(".log")
        with self._free:
            print(json.dumps([[str(recipe), str(out), *options], str(log)]), file=self._server.stdin, flush=True)
            status = self._server.stdout.readline()
        if not status:
            raise RunError("mergekit's environment has no command mergekit-yaml that can be run")
        return int(status), log.read_text(encoding="utf-8", errors="replace")

    def end(self) -> None:
        """End its process."""
        self._server.kill()
        self._server.wait()
        self._code.cleanup()


def polymerge(recipe: Path, out: Path, *options: str) -> tuple[int, str]:
    """Merge with polymerge: exit status and what was printed."""
    program = Path(sys.executable).with_name("polymerge")
    command = [str(program), "merge", str(recipe), "-o", str(out), "--no-verify", *options]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr + done.stdout
