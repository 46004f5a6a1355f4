"""Merge by a method on whole matrices, and die at one of them: `python killed_merge.py RECIPE OUT CALLS THREADS`.

RECIPE is JSON, in which `levelled` of `matrix_methods` can be used. At call number CALLS of its function the process
ends without tidying up, as if by kill -9.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import count
from pathlib import Path

import matrix_methods
import polymerge
from polymerge.engine import finished

NUMBERS = count(1)


def main(recipe: str, out: str, calls: str, threads: str) -> None:
    def called(_: tuple[int, ...]) -> None:
        if next(NUMBERS) == int(calls):
            os._exit(9)

    matrix_methods.CALLED.append(called)
    finished.YOUNG = 0  # the files of a test are as young as it is
    with matrix_methods.known(matrix_methods.ROW):
        polymerge.merge(json.loads(Path(recipe).read_text()), out, threads=int(threads), check=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
