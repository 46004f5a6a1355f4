"""Damaged and hostile inputs of every kind are read, or refused with a message that helps; and so is what once failed.

`benchmarks/fuzz.py` does the same with a million inputs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz_judge import from_text, judge, kept_inputs
from fuzz_kinds import KINDS
from fuzz_pool import run

INPUTS, SEED = 20_000, 17
KEPT = [from_text(line) for line in kept_inputs()]


def test_twenty_thousand_inputs() -> None:
    tallies = run(INPUTS, SEED, list(KINDS), jobs=2)
    assert not [failure for tally in tallies.values() for failure in tally.failures]
    assert sum(tally.inputs for tally in tallies.values()) >= INPUTS
    for kind, tally in tallies.items():  # some of each kind get through, so that more than its first line is read
        assert tally.accepted, kind
        assert tally.refused, kind


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in KEPT}))
def test_inputs_that_failed_once(kind: str, tmp_path: Path) -> None:
    inputs = [files for name, files in KEPT if name == kind]
    verdicts = [judge(KINDS[kind], files, tmp_path / "input", tmp_path) for files in inputs]
    assert not [verdict.failure for verdict in verdicts if verdict.failure]
