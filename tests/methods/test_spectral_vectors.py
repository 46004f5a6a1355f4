"""Spectral methods against the official implementations, whose results are in tests/golden/methods."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from polymerge.methods.calibration import svc
from polymerge.methods.dc_merge import dc_merge
from polymerge.methods.isotropic import iso_c, iso_cts
from polymerge.methods.tsv import tsv_of_deltas
from polymerge.methods.wudi import aswudi, optmerge, swudi
from spectral import away

VECTORS = Path(__file__).parents[1] / "golden" / "methods"
MATRICES = ("layers.0.a.weight", "layers.1.a.weight")
MODELS = 3

CASES = {
    "tsv_m": tsv_of_deltas,
    "iso_c": iso_c,
    "iso_cts": iso_cts,
    "optmerge": optmerge,
    "swudi": swudi,
    "swudi-mean": partial(swudi, init="mean", share=0.85),
    "aswudi": partial(aswudi, init="mean"),
    "aswudi-gavish": partial(aswudi, init="mean", rank_rule="gavish_donoho"),
    "dc_merge": dc_merge,
    "dc_merge-keep0.1": partial(dc_merge, keep=0.1),
    "svc": lambda deltas: svc(deltas.sum(axis=0), deltas),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_merged_delta_is_the_official_one(name, matrix, dtype):
    held = load_file(VECTORS / name / "vector.safetensors")
    base = held[f"base/{matrix}"].astype(np.float64)
    deltas = np.stack([held[f"model{place}/{matrix}"] - base for place in range(MODELS)]).astype(dtype)
    assert away(CASES[name](deltas), held[f"expected/{matrix}"] - base) < 1e-5


@pytest.mark.parametrize("smoothing", ["avg", "linear"])
def test_on_adapters_dc_merge_is_the_official_one(smoothing):
    held = load_file(VECTORS / f"dc_merge-lora-{smoothing}" / "vector.safetensors")
    update = np.stack([held[f"adapter{place}/lora_B"] @ held[f"adapter{place}/lora_A"] for place in range(2)])
    # the released code counts the entries to keep of 32 x 32, the ranks' sum
    merged = dc_merge(update, 0.001 * 32**2 / 40**2, smoothing, ranks=[16, 16])
    assert away(merged, held["expected"]) < 1e-5
