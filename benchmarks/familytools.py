"""The two tools that `families.py` compares: polymerge, and mergekit under several hash seeds."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock

from measure import RunError
from polymerge import merge
from polymerge.errors import PolymergeError, Refused

Tool = Callable[..., tuple[int, str]]
"""Merges: recipe, place of the output, options -> exit status and what was printed."""

Tools = Mapping[str, Mapping[int, Tool]]
"""By name, a tool under each of its hash seeds."""

SEEDS = (0, 1)
ASKED_FOR = ("--allow-crimes", "--trust-remote-code")
"""What mergekit may ask for: models of two architectures, code from a checkpoint."""

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

SERVER = """
import importlib.metadata, json, os, sys, traceback
import torch, transformers
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
"""Runs mergekit's command in forks of a process that has imported it: imports take longer than tiny merges."""


class Mergekit:
    """mergekit's command under one hash seed, one merge at a time."""

    def __init__(self, environment: Path, seed: int) -> None:
        self._free = Lock()
        self._own = tempfile.TemporaryDirectory()  # where it copies the code that it runs
        said = {**os.environ, **ENVIRONMENT, "PYTHONHASHSEED": str(seed), "HF_MODULES_CACHE": self._own.name}
        self._server = subprocess.Popen(
            [str(environment / "bin" / "python"), "-c", SERVER],
            env=said, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

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
        self._own.cleanup()


def polymerge(recipe: Path, out: Path, *_: str) -> tuple[int, str]:
    """Merge with polymerge, in this process: exit status and what its command would print."""
    try:
        merge(recipe, out, check=False)
    except PolymergeError as error:
        return error.exit_status, str(error) if isinstance(error, Refused) else f"1. {error}"
    return 0, ""
