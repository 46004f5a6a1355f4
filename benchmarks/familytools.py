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

Tools = Mapping[str, Mapping[int, Tool]]
"""By name, a tool under each of its hash seeds."""

SEEDS = (0, 1, 2)
ASKED_FOR = ("--allow-crimes", "--trust-remote-code")
"""What mergekit may ask for: models of two architectures, code from a checkpoint."""

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

SERVER = """
import importlib.metadata, json, os, sys, traceback
import torch, transformers
name = sys.argv[1]
(entry,) = importlib.metadata.entry_points(group="console_scripts", name=name)
main = entry.load()
for line in sys.stdin:
    words, log = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.argv, status = [name, *words], 1
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
"""Runs a command in forks of a process that has imported it: imports take longer than tiny merges."""


class Server:
    """A command under one hash seed, one merge at a time; `{recipe}` and `{out}` in it stand for both."""

    def __init__(self, python: Path, command: str, seed: int) -> None:
        (self._name, *self._words), self._free = command.split(), Lock()
        self._own = tempfile.TemporaryDirectory()  # what it keeps, and where it copies the code that it runs
        said = {**os.environ, **ENVIRONMENT, "PYTHONHASHSEED": str(seed), "HF_MODULES_CACHE": self._own.name,
                "XDG_CACHE_HOME": self._own.name}  # fmt: skip
        self._server = subprocess.Popen(
            [str(python), "-c", SERVER, self._name],
            env=said, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def __call__(self, recipe: Path, out: Path, *options: str) -> tuple[int, str]:
        """Merge: exit status and what was printed."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        log = recipe.with_suffix(".log")
        words = [word.format(recipe=recipe, out=out) for word in self._words]
        with self._free:
            print(json.dumps([[*words, *options], str(log)]), file=self._server.stdin, flush=True)
            status = self._server.stdout.readline()
        if not status:
            raise RunError(f"its environment has no command {self._name} that can be run")
        return int(status), log.read_text(encoding="utf-8", errors="replace")

    def end(self) -> None:
        """End its process."""
        self._server.kill()
        self._server.wait()
        self._own.cleanup()


def servers(mergekit: Path | None) -> dict[str, dict[int, Server]]:
    """polymerge as it is installed beside this Python, and mergekit in its environment, if there is one."""
    merge = "polymerge merge {recipe} -o {out} --no-verify"
    found = {"polymerge": {0: Server(Path(sys.executable), merge, 0)}}
    if mergekit is not None:
        python = mergekit / "bin" / "python"
        found["mergekit"] = {seed: Server(python, "mergekit-yaml {recipe} {out}", seed) for seed in SEEDS}
    return found
