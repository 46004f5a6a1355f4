"""Merges on a cluster come out bit for bit as on one machine, also where machines are lost."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from paths import SUPPORT


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # in a process of its own: Ray's warnings are not ours, and it leaves threads behind
    folder = tmp_path_factory.mktemp("ray")
    command = [sys.executable, str(SUPPORT / "ray_merges.py"), str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("kind", ["ties", "gram", "spectral", "adapters", "fold", "stages"])
def test_every_file_is_that_of_one_machine(kind: str, tried: dict[str, Any]) -> None:
    assert tried[kind]["same"]
    assert tried[kind]["tasks"] > 3 or kind == "adapters"


def test_a_machine_is_lost_in_the_middle(tried: dict[str, Any]) -> None:
    assert tried["node lost"]["alive"] == 2
    assert tried["node lost"]["same"]


def test_a_driver_is_killed_and_the_next_run_goes_on(tried: dict[str, Any]) -> None:
    found = tried["driver lost"]
    assert found["status"] == -9
    assert not found["before"]
    assert re.search(r"6 tasks on \d machines: .* read, .* written", found["again"])
    assert re.search(r"went on where it was stopped: [1-5] weight files? (was|were) finished", found["again"])
    assert found["same"]
    assert found["left"] == []


def test_a_full_disk_of_one_machine_is_told_and_leaves_nothing(tried: dict[str, Any]) -> None:
    found = tried["disk full"]
    assert found["kind"] == "OutputError"
    assert "machine " in found["said"]
    assert "No space left on device. Make room" in found["said"]
    assert found["left"] == []


@pytest.mark.parametrize("command", ["search", "evaluate"])
def test_models_are_asked_on_when_a_machine_is_lost(command: str, tried: dict[str, Any]) -> None:
    found = tried[command]
    assert found["ends"] == [1, 0, 0]
    assert "run again to go on" in found["said"]
    assert found["before"] is None
    assert found["kept"] > 0
    assert found["same"]
