"""TIES where many magnitudes are equal, as between bfloat16 checkpoints: all that reach the threshold are kept."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import polymerge
from adapters_made import PEFT_WARNINGS, adapter, exact_updates
from literal_methods import elected, largest
from polymerge.engine.device import Torch
from polymerge.methods.ties import ties
from running import checkpoint, raw
from tiny import load

pytestmark = PEFT_WARNINGS

LAYERS, SHAPE = 8, (64, 128)
NAMES = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(LAYERS)]
DENSITY = 0.3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and two fine-tunes; the step between neighbouring numbers of bfloat16 is most deltas' magnitude."""
    folder, made = tmp_path_factory.mktemp("models"), {}
    base = {name: 0.02 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(place)) for place, name in
            enumerate(NAMES)}  # fmt: skip
    for seed, label in enumerate(("base", "a", "b")):
        dice = torch.Generator().manual_seed(100 + seed)
        own = {name: (one + 1e-4 * seed * torch.randn(SHAPE, generator=dice)).bfloat16() for name, one in base.items()}
        made[label] = checkpoint(folder / label, own)
    return made


def recipe(models: Mapping[str, Path], *labels: str, **parameters: Any) -> dict[str, Any]:
    said = [{"model": str(models[label]), "parameters": {"weight": 0.5}} for label in labels]
    return {"merge_method": "ties", "base_model": str(models["base"]), "models": said, "parameters": parameters}


def deltas(models: Mapping[str, Path], label: str) -> list[NDArray[Any]]:
    own, base = load(models[label]), load(models["base"])
    return [(own[name].float() - base[name].float()).numpy().ravel() for name in NAMES]


def kept(folder: Path, models: Mapping[str, Path]) -> list[NDArray[Any]]:
    """Which entries a merge of one model has moved."""
    out, base = load(folder), load(models["base"])
    return [(out[name].float() != base[name].float()).numpy().ravel() for name in NAMES]


def first_by_index(delta: NDArray[Any], density: float) -> NDArray[Any]:
    """What another rule keeps: as many as the density says, of equals the first."""
    chosen = np.zeros(delta.size, bool)
    chosen[np.argsort(-np.abs(delta), kind="stable")[: int(density * delta.size)]] = True
    return chosen


def test_every_tensor_keeps_all_that_reach_its_threshold(models: dict[str, Path], tmp_path: Path) -> None:
    asked = recipe(models, "a", density=DENSITY, normalize="none") | {"dtype": "float32"}
    found = kept(polymerge.merge(asked, tmp_path / "out", check=False, block=1000).folder, models)
    quarters, others = [], []
    for mask, delta in zip(found, deltas(models, "a"), strict=True):
        reach = np.sort(np.abs(delta))[-int(DENSITY * delta.size)]
        assert np.count_nonzero(np.abs(delta) == reach) > 200  # many equals, and so a question
        np.testing.assert_array_equal(mask, np.abs(delta) >= reach)
        quarters.append([part.mean() for part in np.split(mask, 4)])
        others.append([part.mean() for part in np.split(first_by_index(delta, DENSITY), 4)])
    means, biased = np.mean(quarters, axis=0), np.mean(others, axis=0)
    assert np.ptp(means) < 0.02
    assert np.ptp(biased) > 0.1


def test_a_threshold_over_the_model_keeps_as_much_of_every_layer(models: dict[str, Path], tmp_path: Path) -> None:
    asked = recipe(models, "a", density=DENSITY, normalize="none", trim="model") | {"dtype": "float32"}
    found = kept(polymerge.merge(asked, tmp_path / "out", check=False, block=1000).folder, models)
    whole = np.concatenate(deltas(models, "a"))
    reach = np.sort(np.abs(whole))[-int(DENSITY * whole.size)]
    np.testing.assert_array_equal(np.concatenate(found), np.abs(whole) >= reach)
    assert np.ptp([mask.mean() for mask in found]) < 0.03
    assert np.ptp([part.mean() for part in np.split(first_by_index(whole, DENSITY), LAYERS)]) > 0.1


@pytest.mark.parametrize("trim", ["tensor", "model"])
def test_no_bit_depends_on_blocks_threads_or_the_device(
    models: dict[str, Path], trim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(models, "a", "b", density=DENSITY, trim=trim)
    found = []
    for place, (block, threads) in enumerate(product((1 << 19, 1000, 77), (1, 2))):
        found.append(
            raw(polymerge.merge(asked, tmp_path / str(place), check=False, block=block, threads=threads).folder)
        )
    monkeypatch.setattr("polymerge.engine.merge.open_device", lambda _: Torch("cpu"))
    found.append(raw(polymerge.merge(asked, tmp_path / "torch", check=False, block=1000).folder))
    assert all(one == found[0] for one in found)
    rows = [deltas(models, label) for label in "ab"]
    if trim == "model":
        rows = [np.split(largest(np.concatenate(row), DENSITY), LAYERS) for row in rows]
    else:
        rows = [[largest(delta, DENSITY) for delta in row] for row in rows]
    out, base = load(tmp_path / "0"), load(models["base"])
    for name, *own in zip(NAMES, *rows, strict=True):
        change = torch.from_numpy(elected(own, [0.5, 0.5], "weighted", "weight")).reshape(SHAPE)
        assert torch.equal(out[name], (base[name].float() + change).bfloat16()), name


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 999), st.integers(1, 12), st.integers(1, 300), st.floats(0, 1))
def test_the_order_of_entries_plays_no_part(seed: int, values: int, n: int, density: float) -> None:
    dice = np.random.default_rng(seed)
    x = dice.integers(-values, values + 1, (2, n)).astype(np.float32)
    order = dice.permutation(n)
    straight, reordered = (ties(one.copy(), [0.6, 0.4], density) for one in (x, x[:, order]))
    np.testing.assert_array_equal(straight[order], reordered)


# --- at least one


TINY = {
    "model.norm.weight": (6,),
    "model.layers.0.mlp.gate_up_proj.weight": (8, 3),  # two matrices in one tensor
    "model.layers.0.self_attn.o_proj.weight": (4, 3),
}


@pytest.mark.parametrize(
    ("density", "trim", "left"), [(0.01, "tensor", (1, 2, 1)), (0.01, "model", (0, 1, 0)), (0.0, "tensor", (0, 0, 0)),
                                  (0.0, "model", (0, 0, 0))]
)  # fmt: skip
def test_a_density_above_zero_keeps_one_entry_at_least(
    density: float, trim: str, left: tuple[int, ...], tmp_path: Path
) -> None:
    base = {name: torch.zeros(shape) for name, shape in TINY.items()}
    own = {name: torch.randn(shape, generator=torch.Generator().manual_seed(3)) for name, shape in TINY.items()}
    own["model.layers.0.mlp.gate_up_proj.weight"][5, 1] = -9  # the largest of all
    config = {"model_type": "phi3", "intermediate_size": 4}
    places = {label: checkpoint(tmp_path / label, held, config) for label, held in (("base", base), ("a", own))}
    asked = recipe(places, "a", density=density, trim=trim, normalize="none")
    out = load(polymerge.merge(asked, tmp_path / "out", check=False).folder)
    assert tuple(int(out[name].count_nonzero()) for name in TINY) == left
    if density:
        fused = own["model.layers.0.mlp.gate_up_proj.weight"]
        wanted = torch.zeros_like(fused)
        wanted[5, 1] = fused[5, 1] / 2
        if trim == "tensor":
            gate = fused[:4].abs() == fused[:4].abs().max()
            wanted[:4][gate] = fused[:4][gate] / 2
        assert torch.equal(out["model.layers.0.mlp.gate_up_proj.weight"], wanted)


def test_so_does_each_module_of_adapters(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / str(seed), seed) for seed in range(2)]
    models = [{"model": str(folder), "parameters": {"weight": 1.0}} for folder in folders]
    asked = {"merge_method": "ties", "models": models, "parameters": {"density": 1e-9, "rank": 8}}
    out = exact_updates(polymerge.merge(asked, tmp_path / "out", check=False).folder)
    own = [exact_updates(folder) for folder in folders]
    for module, update in out.items():
        rows = [largest(one[module].ravel(), 1e-9) for one in own]
        wanted = elected(rows, [1.0, 1.0], "weighted", "weight").reshape(update.shape)
        assert 1 <= np.count_nonzero(wanted) <= 2
        np.testing.assert_allclose(update, wanted, atol=1e-5)
