"""What a matrix takes while it is merged: what was planned, and for long ones no more than T + 4 times its size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from paths import SUPPORT
from polymerge.methods import decompositions
from polymerge.methods.table import METHODS
from polymerge.planning.matrix_costs import Matrices

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc"),
    pytest.mark.skipif(decompositions._scipy() is None, reason="SciPy is not installed"),
]

LONG, LYING, SQUARE = (4096, 1024), (1024, 4096), (1024, 1024)
NAMES = [row.name for row in METHODS.values() if row.on == "matrices"] + ["calibrate: svc"]
CASES = [(name, 3, *shape) for name in NAMES for shape in (LONG, LYING, SQUARE)]
WIDE = [case for case in CASES if case[0] in ("swudi", "aswudi") and case[2:] == LYING]
"""They decompose what is as large as three quarters of the inputs' side, 3072: here 4.5 times the matrix in float64."""
BELOW = ("swudi", 2, *LYING)
"""The same with a side of 2048."""


@pytest.fixture(scope="module")
def peaks() -> dict[tuple[str, int, int, int], int]:
    measured = [*(case for case in CASES if case not in WIDE), BELOW]
    command = [sys.executable, str(SUPPORT / "matrix_memory.py"), json.dumps(measured)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return dict(zip(measured, map(int, done.stdout.split()), strict=True))


def test_long_ones_take_no_more_than_four_of_themselves_beside_the_models(
    peaks: dict[tuple[str, int, int, int], int],
) -> None:
    found = {
        case: peak / (4 * case[2] * case[3]) for case, peak in peaks.items() if case[2:] != SQUARE and case != BELOW
    }
    assert max(found.values()) < 3 + 4, found
    assert min(found.values()) > 3  # it sees the deltas


def test_it_is_what_was_planned(peaks: dict[tuple[str, int, int, int], int]) -> None:
    off = {}
    for (name, models, rows, columns), peak in peaks.items():
        calibrated = name == "calibrate: svc"
        row = METHODS["task_arithmetic" if calibrated else name]
        off[name, models, rows, columns] = peak / Matrices(1, rows, columns, models, 4, row, calibrated).room
    wrong = {case: round(share, 2) for case, share in off.items() if not 0.8 < share < 1.2}
    assert not wrong
