"""Workers that stay alive between requests: a program that takes long to start is started once for many tests."""

from __future__ import annotations

import json
import subprocess
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

from polymerge.inference.programs import comparing
from polymerge.inference.programs.program_table import Place, Program
from polymerge.inference.programs.workers import worker_environment

_HOST = """
import gc, importlib.util, json, os, sys, traceback
spec = importlib.util.spec_from_file_location("worker", sys.argv[1])
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
for line in sys.stdin:
    request, result = json.loads(line)
    try:
        found = worker.main(request)
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    gc.collect()
    with open(result + ".new", "w") as file:
        json.dump(found, file)
    os.replace(result + ".new", result)
"""


class WarmWorkers:
    """One process for each worker and Python; `run` takes the place of `run_worker`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._asked = folder, 0
        self._running: dict[tuple[str, str], subprocess.Popen[str]] = {}

    def run(self, program: Program, place: Place, request: dict[str, Any], _: Path) -> dict[str, Any]:
        """Ask the worker that is there, or start it."""
        key = (program.worker, place.python)
        if key not in self._running:
            worker = Path(comparing.__file__).with_name(program.worker)
            with (self._folder / f"{program.name}-{len(self._running)}.log").open("w") as log:
                self._running[key] = subprocess.Popen(
                    [place.python, "-c", _HOST, str(worker)], stdin=subprocess.PIPE, stdout=log, stderr=log, text=True,
                    env=worker_environment(program), cwd=self._folder,
                )  # fmt: skip
        process, self._asked = self._running[key], self._asked + 1
        result = self._folder / f"result-{self._asked}.json"
        assert process.stdin is not None
        print(json.dumps([request, str(result)]), file=process.stdin, flush=True)
        while not result.is_file():
            assert process.poll() is None, f"{program.name} ended with {process.returncode}; see {self._folder}"
            time.sleep(0.1)
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found

    def close(self) -> None:
        for process in self._running.values():
            with process:
                process.kill()


def in_this_process(program: Program, _: Place, request: dict[str, Any], __: Path) -> dict[str, Any]:
    """Run a worker here, where its libraries are loaded already."""
    worker = import_module(f"polymerge.inference.programs.{Path(program.worker).stem}")
    try:
        with warnings.catch_warnings():  # a worker is alone otherwise, and nobody reads what it warns of
            warnings.simplefilter("ignore")
            found: dict[str, Any] = worker.main(request)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return found
