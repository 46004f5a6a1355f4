"""Merge by a method on whole matrices, and die at one of them: `python killed_merge.py RECIPE OUT CALLS THREADS`.

RECIPE is JSON, in which `levelled` of `matrix_methods` can be used; or the arguments of `extract`. At call number CALLS
of its function, or at that module, the process ends without tidying up, as if by kill -9. `killed` runs that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import matrix_methods
import polymerge
from polymerge.engine import differences, finished

NUMBERS = count(1)


def killed(recipe: dict[str, Any], out: Path, calls: int, threads: int = 1) -> Path:
    """Kill a merge at one of its matrices; returns the folder that it leaves behind."""
    file = out.with_name("recipe.json")
    file.write_text(json.dumps(recipe))
    command = [sys.executable, __file__, str(file), str(out), str(calls), str(threads)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 9, ran.stderr
    assert not out.exists()
    return out.with_name(f".{out.name}.polymerge-partial")


def main(recipe: str, out: str, calls: str, threads: str) -> None:
    def called(_: tuple[int, ...]) -> None:
        if next(NUMBERS) == int(calls):
            os._exit(9)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            called(())
            return function(*arguments)

        return call

    said = json.loads(Path(recipe).read_text())
    matrix_methods.CALLED.append(called)
    # of modules, and of experts
    differences.leading, differences.largest = counted(differences.leading), counted(differences.largest)
    finished.YOUNG = 0  # the files of a test are as young as it is
    if "tuned" in said:
        polymerge.extract(out=out, threads=int(threads), check=False, **said)
        return
    with matrix_methods.known(matrix_methods.ROW):
        polymerge.merge(said, out, threads=int(threads), check=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
