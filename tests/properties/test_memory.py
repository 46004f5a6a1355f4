"""A merge's memory does not grow with the models: neither with their size nor with their number of tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np
import pytest

from paths import SUPPORT
from polymerge.engine.pool import Pool
from polymerge.planning.estimate import BLOCK

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")

MIB = 1 << 20
TINY, SMALL, LARGE = 9_000_000, 24_000_000, 96_000_000


def write(folder: Path, parameters: int, seed: int) -> Path:
    """bfloat16 numbers near those of seed 0: half of them one tensor, the rest in matrices of 4096 x 1024."""
    count = parameters // 2 // (4096 * 1024)
    shapes = {"model.embed_tokens.weight": (parameters // 2048, 1024)}
    shapes |= {f"model.layers.{layer}.mlp.up_proj.weight": (4096, 1024) for layer in range(count)}
    header: dict[str, Any] = {}
    end = 0
    for name, (rows, columns) in shapes.items():
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [end, end + 2 * rows * columns]}
        end += 2 * rows * columns
    text = json.dumps(header).encode()
    # one stretch of numbers, again and again: what matters here is how many there are
    numbers = np.random.default_rng(0).normal(0, 1, 1 << 20).astype(np.float32)
    numbers += np.random.default_rng(seed).normal(0, 0.01, 1 << 20).astype(np.float32) * bool(seed)
    stretch = (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(stretch)):
            file.write(stretch[: end - start])
    (folder / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    return folder


def again(model: Path, folder: Path) -> Path:
    """The same model under another name, without taking room on the disk."""
    folder.mkdir()
    for file in model.iterdir():
        os.link(file, folder / file.name)
    return folder


RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear"},
    "slerp": {"merge_method": "slerp", "parameters": {"t": 0.3}},
    "ties": {"merge_method": "ties", "parameters": {"density": 0.2}},
    "ties, whole models": {"merge_method": "ties", "parameters": {"density": 0.2, "trim": "model"}},
    "dare_ties": {"merge_method": "dare_ties", "parameters": {"density": 0.2}},
    "iso_c": {"merge_method": "iso_c"},
    "tsv": {"merge_method": "tsv"},
}
SPECTRAL = [("iso_c", 2), ("tsv", 2)]
"""What takes whole matrices into memory."""


class Family:
    """A base and eight models of one size."""

    def __init__(self, folder: Path, size: int) -> None:
        folder.mkdir()
        self.base, one, two = (write(folder / str(seed), size, seed) for seed in range(3))
        self.models = [one, two, *(again((one, two)[number % 2], folder / f"copy{number}") for number in range(6))]

    def job(self, name: str, count: int, out: Path) -> dict[str, Any]:
        weight = {} if name in ("slerp", "iso_c") else {"parameters": {"weight": 0.5}}
        models = [{"model": str(model), **weight} for model in self.models[:count]]
        return {"source": {**RECIPES[name], "models": models, "base_model": str(self.base)}, "out": str(out)}


ELEMENTWISE = [name for name in RECIPES if (name, 2) not in SPECTRAL]
CASES = [(name, count) for name in ELEMENTWISE for count in (2, 8) if (name, count) != ("slerp", 8)]
SEEN = [("linear", 2), ("linear", 8)]
REPEATS = 9
BOTH_SIZES = [case for case in CASES if case[1] == 2] + [("ties, whole models", 8)]


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, int], int]:
    """The peak of anonymous memory of every merge, by method, number of models and number of parameters."""
    folder = tmp_path_factory.mktemp("memory")
    tiny, small, large = (Family(folder / str(size), size) for size in (TINY, SMALL, LARGE))
    measured = [(small, SMALL, case) for case in (*CASES, *SPECTRAL)] + [(large, LARGE, case) for case in BOTH_SIZES]
    # what a fork happens to touch beside its merge adds, and on a busy machine the watch misses a peak: not in most
    measured += REPEATS * [(small, SMALL, case) for case in SEEN]
    every: dict[tuple[str, int, int], list[int]] = {}
    for name in RECIPES:  # in a process of its own: what other methods have left of their memory hides what is taken
        own = [job for job in measured if job[2][0] == name]
        jobs = {
            "warm up": [tiny.job(*case, folder / "out") for case in dict.fromkeys(case for _, _, case in own)],
            "measure": [family.job(*case, folder / "out") for family, _, case in own],
        }
        (folder / "jobs.json").write_text(json.dumps(jobs))
        command = [sys.executable, str(SUPPORT / "merge_and_measure.py"), str(folder / "jobs.json")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        for (_, size, case), peak in zip(own, json.loads(done.stdout), strict=True):
            every.setdefault((*case, size), []).append(peak)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return {key: median_low(found) for key, found in every.items()}


def test_no_merge_takes_much(peaks: dict[tuple[str, int, int], int]) -> None:
    found = {case: peak for case, peak in peaks.items() if case[:2] not in SPECTRAL}
    assert max(found.values()) < 250 * MIB, {case: peak // MIB for case, peak in found.items()}


def test_whole_matrices_take_some_more_than_the_models_of_one(peaks: dict[tuple[str, int, int], int]) -> None:
    """Two of them at once, each with its models' deltas; all together no more than T + 4 times the largest tensor."""
    matrix, largest = 4 * 4096 * 1024, 4 * SMALL // 2
    for name, count in SPECTRAL:
        peak = peaks[name, count, SMALL]
        assert 2 * count * matrix < peak < (count + 4) * largest, f"{name}: {peak // MIB} MiB"


def test_more_parameters_take_no_more_memory(peaks: dict[tuple[str, int, int], int]) -> None:
    for name, count in BOTH_SIZES:
        small, large = peaks[name, count, SMALL], peaks[name, count, LARGE]
        assert large < small + 32 * MIB, f"{name} of {count}: {small // MIB} and {large // MIB} MiB"


def test_the_measurement_sees_memory(peaks: dict[tuple[str, int, int], int]) -> None:
    """Were it blind, the two above could not fail: a thread holds a block of eight models, or of two."""
    row = 2 * BLOCK  # BF16, as bits
    assert peaks["linear", 8, SMALL] > 8 * row
    assert peaks["linear", 8, SMALL] > peaks["linear", 2, SMALL] + 3 * row


def test_work_waits_in_line_and_not_in_memory() -> None:
    asked, done = [], []

    def indices() -> Iterator[int]:
        for index in range(5000):
            asked.append(index)
            assert len(asked) - len(done) < 20
            yield index

    pool = Pool(2)
    try:
        for result in pool.run_all(lambda index: index * 2, indices()):
            done.append(result)
    finally:
        pool.close()
    assert done == [2 * index for index in range(5000)]
