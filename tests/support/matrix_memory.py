"""Merge matrices in processes of their own and report how much memory each takes: `python matrix_memory.py CASES`.

CASES is JSON, [[name, models, rows, columns], ...], of methods on matrices or "calibrate: svc". Prints the peaks of
anonymous memory over what the fork began with, the deltas included, in bytes.
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np

from merge_and_measure import Watch, anonymous
from polymerge.methods.calibration import svc
from polymerge.methods.decompositions import one_thread
from polymerge.methods.method import method_function
from polymerge.methods.table import METHODS


def peak_of(name: str, models: int, rows: int, columns: int) -> int:
    before = anonymous()
    calibrated = name == "calibrate: svc"
    deltas = np.empty((models + calibrated, rows, columns), np.float32)
    draws = np.random.default_rng(0)
    for delta in deltas:
        for row in delta:
            row[:] = draws.standard_normal(columns, dtype=np.float32)
    watch = Watch()
    watch.start()
    with one_thread():
        if calibrated:
            svc(deltas[-1], deltas[:-1])
        else:
            method_function(METHODS[name])(deltas)
    watch.over.set()
    watch.join()
    return watch.peak - before


if __name__ == "__main__":
    with one_thread():  # imports count for nobody
        pass
    for case in json.loads(sys.argv[1]):
        if not case[0].startswith("calibrate"):
            method_function(METHODS[case[0]])
        child = os.fork()
        if child == 0:
            print(peak_of(*case), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
