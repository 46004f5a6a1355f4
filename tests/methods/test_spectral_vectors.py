"""Spectral methods against the official implementations, whose results are in tests/golden/methods."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from polymerge.methods.isotropic import iso_c
from polymerge.methods.tsv import tsv_of_deltas
from spectral import away

VECTORS = Path(__file__).parents[1] / "golden" / "methods"
MATRICES = ("layers.0.a.weight", "layers.1.a.weight")
MODELS = 3

CASES = {
    "tsv_m": tsv_of_deltas,
    "iso_c": iso_c,
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_merged_delta_is_the_official_one(name, matrix, dtype):
    held = load_file(VECTORS / name / "vector.safetensors")
    base = held[f"base/{matrix}"].astype(np.float64)
    deltas = np.stack([held[f"model{place}/{matrix}"] - base for place in range(MODELS)]).astype(dtype)
    assert away(CASES[name](deltas), held[f"expected/{matrix}"] - base) < 1e-5
