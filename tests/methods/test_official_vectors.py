"""Merges by the public path against what the methods' official code makes of the same small tensors.

The vectors are in golden/methods, each with a README of its source; none of that code is here. What a tensor may differ
by is counted against the change that the official merge makes of the base: 1e-5 of its norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import polymerge
from paths import GOLDEN
from polymerge.engine.device import Torch
from polymerge.engine.statistics import draw_keys
from polymerge.methods.kernels import keep_ranked, tensor
from running import checkpoint

NAMES = {
    "layers.0.a.weight": "model.layers.0.mlp.up_proj.weight",
    "layers.1.a.weight": "model.layers.1.mlp.up_proj.weight",
    "layers.1.norm.weight": "model.layers.1.input_layernorm.weight",
}
"""The vectors' tensors, and the names that they are merged under here."""

THREE: Mapping[str, Any] = {"weight": [0.5, 0.3, 0.4], "density": [0.4, 0.5, 0.3]}
CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "breadcrumbs-gamma0.01": ("breadcrumbs", {**THREE, "gamma": 0.01}),
    "breadcrumbs-gamma0.1": ("breadcrumbs", {**THREE, "gamma": 0.1}),
    "breadcrumbs_ties-gamma0.1": ("breadcrumbs_ties", {**THREE, "gamma": 0.1}),
    "della": ("della", THREE),
    "della_linear": ("della_linear", THREE),
    "karcher": ("karcher", {}),
    "model_stock": ("model_stock", {}),
    "model_stock-filter": ("model_stock", {"filter_wise": True}),
    "multislerp": ("multislerp", {"weight": [0.5, 0.3, 0.2]}),
    "multislerp-base": ("multislerp", {"weight": [0.5, 0.3, 0.2]}),
    "sce-topk0.1": ("sce", {"select_topk": 0.1}),
    "sce-topk0.5": ("sce", {"select_topk": 0.5}),
    "sce-topk1.0": ("sce", {"select_topk": 1.0}),
}
"""By the name of the folder: the method, and its parameters, a list where there is a value for each model."""

WITHOUT_BASE = {"karcher", "multislerp"}
DROPPED_WHOLE = {("breadcrumbs-gamma0.01", "layers.1.norm.weight")}
"""Where no entry is an outlier the official code drops the whole delta of a tensor; here none is dropped above."""


def vectors(case: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of a case by their role (base, model0, ..., expected) and name."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, held in load_file(GOLDEN / "methods" / case / "vector.safetensors").items():
        role, _, own = name.partition("/")
        found.setdefault(role, {})[own] = held
    return found


def merged(case: str, held: Mapping[str, Mapping[str, Tensor]], folder: Path) -> dict[str, Tensor]:
    """What polymerge makes of a case."""
    method, parameters = CASES[case]
    for role in ("base", "model0", "model1", "model2"):
        checkpoint(folder / role, {NAMES[name]: one for name, one in held[role].items()})
    each = {name: value for name, value in parameters.items() if isinstance(value, list)}
    recipe = {
        "merge_method": method,
        "models": [
            {"model": str(folder / f"model{place}"), "parameters": {name: value[place] for name, value in each.items()}}
            for place in range(3)
        ],
        "parameters": {name: value for name, value in parameters.items() if name not in each},
    }
    if case not in WITHOUT_BASE:
        recipe["base_model"] = str(folder / "base")
    out = load_file(polymerge.merge(recipe, folder / "out", check=False).folder / "model.safetensors")
    return {name: out[own] for name, own in NAMES.items()}


def with_their_draws(held: Mapping[str, Mapping[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the vectors' draws in place of polymerge's own, in the kernels for tensors."""
    canonical = {name: f"text.{own.removeprefix('model.')}" for name, own in NAMES.items()}
    words = {
        key: (held[f"uniform{place}"][name].double().reshape(-1) * 2**32).to(torch.int64)
        for name in NAMES
        for place, key in enumerate(draw_keys(42, [0, 1, 2], canonical[name]))
    }

    def drawn(key: int, counter: int, count: int, _: torch.device) -> Tensor:
        padded = torch.nn.functional.pad(words[key], (0, 3))
        return padded[4 * counter : 4 * (counter + count)]

    monkeypatch.setattr(tensor, "_philox", drawn)
    monkeypatch.setattr("polymerge.engine.merge.open_device", lambda _: Torch("cpu"))


@pytest.mark.parametrize("case", CASES)
def test_it_gives_what_the_official_code_gives(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = vectors(case)
    if "uniform0" in held:
        with_their_draws(held, monkeypatch)
    found = merged(case, held, tmp_path)
    for name, expected in held["expected"].items():
        change = float((expected - held["base"][name]).norm())
        away = float((found[name] - expected).norm())
        if (case, name) in DROPPED_WHOLE:
            assert change == 0 < away
        else:
            assert change > 0
            assert away <= 1e-5 * change, (name, away / change)


@pytest.mark.parametrize("case", ["della", "della_linear"])
def test_della_s_own_draws_are_as_likely_as_theirs(case: str) -> None:
    """Over many seeds an entry is kept as often as its probability says."""
    held = vectors(case)
    density = CASES[case][1]["density"]
    for name in ("layers.0.a.weight", "layers.1.norm.weight"):
        width = held["base"][name].shape[-1]
        for place in range(3):
            delta = (held[f"model{place}"][name] - held["base"][name]).reshape(1, -1).numpy()
            kept = np.zeros(delta.size)
            for seed in range(2000):
                (key,) = draw_keys(seed, [place], name)
                left = keep_ranked(delta.copy(), width, [key], 0, [density[place]], [0.15], [1.0])
                kept += left[0] != 0
            chance = held[f"probability{place}"][name].reshape(-1).double().numpy()
            deviation = np.sqrt(chance * (1 - chance) / 2000)
            assert np.abs(kept / 2000 - chance).max() < 4.5 * deviation.max()
            assert abs((kept / 2000 - chance).mean()) < 4 * deviation.max() / np.sqrt(delta.size)
