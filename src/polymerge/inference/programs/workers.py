"""Run a worker in the Python of a program: a request goes in as a file, a result comes out as one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any, Final

from polymerge.errors import MissingExtraError, shown
from polymerge.inference.programs.program_table import Place, Program

__all__ = ["check_installed", "run_worker", "worker_environment"]

_APART: Final = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
"""Python does not look for modules beside the worker, where polymerge's own lie."""

_LAST: Final = 5  # lines of a log


def check_installed(program: Program, place: Place) -> None:
    """Check that a program's Python has the module it needs; raises MissingExtraError if not."""
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({program.needs!r}) is None)"
    done = subprocess.run([place.python, "-c", look], env=worker_environment(program), capture_output=True, check=False)
    if done.returncode != 0:
        raise MissingExtraError(
            f"{program.name}: {place.python} has no {program.needs}: {program.install}, and name that with "
            "`environment`"
        )


def run_worker(program: Program, place: Place, request: dict[str, Any], work: Path) -> dict[str, Any]:
    """Run the worker of a program on a request; its result, or `error` with what went wrong.

    work  a folder for request, result and the log; a worker that is interrupted is ended with all that it has started
    """
    files = {kind: work / f"{program.name}.{kind}.json" for kind in ("request", "result")}
    files["result"].unlink(missing_ok=True)
    files["request"].write_text(json.dumps(request), encoding="utf-8")
    log = work / f"{program.name}.log"
    command = [place.python, str(Path(__file__).with_name(program.worker)), *map(str, files.values())]
    with log.open("wb") as written:
        worker = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=written, stderr=subprocess.STDOUT, cwd=work,
            env=worker_environment(program), start_new_session=True,
        )  # fmt: skip
        try:
            worker.wait()
        except BaseException:
            os.killpg(worker.pid, signal.SIGTERM)
            worker.wait()
            raise
    if not files["result"].is_file():
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        last = shown(" | ".join(lines[-_LAST:]), 600)
        return {"error": f"it ended with exit status {worker.returncode}, and said last: {last}"}
    result: dict[str, Any] = json.loads(files["result"].read_text(encoding="utf-8"))
    return result


def worker_environment(program: Program) -> dict[str, str]:
    """The variables of a worker; what polymerge's Python is told to import is nothing to another one."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return {**program.sets, **kept, **_APART}
