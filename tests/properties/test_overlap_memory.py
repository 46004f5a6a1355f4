"""Comparing deltas takes no more memory for a larger model; for singular values, that of one matrix."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paths import SUPPORT

MIB = 1 << 20
SMALL, LARGE = 20_000_000, 60_000_000
FEW, MANY = 6, 18
ROWS, COLUMNS = 1600, 640

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")

MEASURE = """
import ctypes, gc, json, sys
import merge_and_measure
from polymerge.analysis.overlap import overlap
merge_and_measure.merge = lambda job: overlap(job["source"], svd=job["svd"], threads=2)
jobs = json.loads(sys.stdin.read())
for warming in jobs["warm up"]:
    merge_and_measure.merge(warming)
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
print(json.dumps([merge_and_measure.in_a_fork(job) for job in jobs["measure"]]))
"""


def write(folder: Path, shapes: dict[str, tuple[int, int]], seed: int) -> Path:
    """bfloat16 numbers, one stretch of them again and again: what matters here is how many there are."""
    header: dict[str, Any] = {}
    end = 0
    for name, (rows, columns) in shapes.items():
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [end, end + 2 * rows * columns]}
        end += 2 * rows * columns
    text = json.dumps(header).encode()
    numbers = np.random.default_rng(seed).normal(0, 1, ROWS * COLUMNS).astype(np.float32)
    stretch = (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(stretch)):
            file.write(stretch[: end - start])
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def embedding(folder: Path, parameters: int, seed: int) -> Path:
    """One tensor that holds all of a model's numbers."""
    return write(folder, {"model.embed_tokens.weight": (parameters // 1000, 1000)}, seed)


def matrices(folder: Path, count: int, seed: int) -> Path:
    """Matrices of one size, as many as said, and nothing else."""
    return write(folder, {f"model.layers.{n}.mlp.up_proj.weight": (ROWS, COLUMNS) for n in range(count)}, seed)


def job(models: list[Path], svd: bool) -> dict[str, Any]:
    base, *tuned = map(str, models)
    entries = [{"model": model, "parameters": {"weight": 0.5}} for model in tuned]
    return {"source": {"merge_method": "task_arithmetic", "base_model": base, "models": entries}, "svd": svd}


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """Of the entries of a small and a large model, of few and of many matrices."""
    folder = tmp_path_factory.mktemp("memory")
    tiny = job([matrices(folder / f"tiny{seed}", 1, seed) for seed in range(3)], True)
    jobs = [
        *(
            job([embedding(folder / f"{size}-{seed}", size, seed) for seed in range(3)], False)
            for size in (SMALL, LARGE)
        ),
        *(job([matrices(folder / f"{n} {seed}", n, seed) for seed in range(3)], True) for n in (FEW, MANY)),
    ]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], input=json.dumps({"warm up": [tiny], "measure": jobs}), capture_output=True,
        text=True, timeout=300, check=False, cwd=SUPPORT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    found: list[int] = json.loads(done.stdout)
    return found


def test_entries_of_a_larger_model_take_no_more_memory(peaks: list[int]) -> None:
    small, large, *_ = peaks
    assert large < small + 24 * MIB, f"{small // MIB} and {large // MIB} MiB"
    assert large < 160 * MIB


def test_more_matrices_take_no_more_memory(peaks: list[int]) -> None:
    """All deltas of the larger model would be 140 MiB."""
    *_, few, many = peaks
    assert many < few + 24 * MIB, f"{few // MIB} and {many // MIB} MiB"
    assert many < 160 * MIB


def test_the_measurement_sees_memory(peaks: list[int]) -> None:
    """Were it blind, the two above could not fail: two blocks of two deltas, and a matrix of float32."""
    small, _, few, _ = peaks
    assert small > 8 * MIB
    assert few > 4 * ROWS * COLUMNS
