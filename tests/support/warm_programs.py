"""Programs that stay alive between requests: one that takes long to start is started once for many tests."""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

from polymerge.inference.programs.program_process import ProgramFailedError, ProgramProcess, program_file
from polymerge.inference.programs.program_table import Place, Program


class WarmPrograms:
    """One process for each program and Python; its `ask` takes the place of that of `comparing`."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, str], ProgramProcess] = {}

    def ask(self, program: Program, place: Place, request: dict[str, Any]) -> dict[str, Any]:
        """Ask the process that is there, or start it; one that failed is started anew for the next request."""
        key = (program.name, place.python)
        if key not in self._running:
            self._running[key] = ProgramProcess(program.name, place.python, program_file(program.file))
        try:
            return self._running[key].call("ask", request)
        except ProgramFailedError as error:
            self._running.pop(key).close()
            return {"error": str(error)}

    def close(self) -> None:
        for process in self._running.values():
            process.close()


def in_this_process(program: Program, _: Place, request: dict[str, Any]) -> dict[str, Any]:
    """Run the file of a program here, where its libraries are loaded already."""
    file = import_module(f"polymerge.inference.programs.{Path(program.file).stem}")
    try:
        with warnings.catch_warnings():  # a program is alone otherwise, and nobody reads what it warns of
            warnings.simplefilter("ignore")
            found: dict[str, Any] = file.ask(request)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return found
