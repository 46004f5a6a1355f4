"""Spectral methods from a recipe to a folder: on checkpoints bit for bit, on adapters as their updates are merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters_made import PEFT_WARNINGS, adapter, exact_updates
from polymerge.methods.method import method_function
from polymerge.methods.table import METHODS
from running import cli, merged, recipe_file
from spectral import (
    away,
    flow,
    literal_closed,
    literal_dc_merge,
    literal_iso_c,
    literal_iso_cts,
    literal_optmerge,
    literal_tsv,
    participation,
)
from tiny import build, load, perturbed

pytestmark = PEFT_WARNINGS

ASKED: Mapping[str, Mapping[str, Any]] = {
    "tsv": {"weight": (1.0, 0.5), "share": 0.25},
    "iso_c": {},
    "iso_cts": {"common_space_fraction": 0.6},
    "optmerge": {},
    "swudi": {"init": "mean", "share": 0.85},
    "aswudi": {"init": "mean", "rank_rule": "gavish_donoho"},
    "dc_merge": {"keep": 0.1, "smoothing": "linear", "rho": 3.0},
    "ip_merge": {"weight": (1.0, 0.5), "rank": 8, "threshold": 0.1},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two fine-tunes of it."""
    folder = tmp_path_factory.mktemp("models")
    base = build("llama", folder / "base")
    return [base, *(perturbed(base, folder / f"tuned{seed}", seed=seed) for seed in (1, 2))]


def recipe(method: str, models: Sequence[Path], said: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    parameters = {name: value for name, value in said.items() if name != "weight"}
    entries = [{"model": str(model)} for model in models]
    for entry, weight in zip(entries, said.get("weight", ()), strict=False):
        entry["parameters"] = {"weight": weight}
    return {"merge_method": method, "models": entries, "parameters": parameters | {"scale": 0.75}, **more}


def test_every_method_on_matrices_is_tried() -> None:
    assert {row.name for row in METHODS.values() if row.on == "matrices"} == ASKED.keys()


@pytest.mark.parametrize("method", ASKED)
def test_a_checkpoint_gets_what_the_function_gives(method: str, models: list[Path], tmp_path: Path) -> None:
    base, *tuned = models
    out = load(merged(recipe(method, tuned, ASKED[method], base_model=str(base)), tmp_path / "out"))
    before, after = load(base), [load(model) for model in tuned]
    count, row = 0, METHODS[method]
    for name, tensor in before.items():
        origin = tensor.float().numpy()
        deltas = np.stack([model[name].float().numpy() - origin for model in after])
        if tensor.ndim == 2 and "embed" not in name and "head" not in name:
            delta = method_function(row)(deltas, **ASKED[method])
            count += 1
        elif row.rest == "first":
            delta = deltas[0]
        else:
            weight = ASKED[method].get("weight", (1.0, 1.0))
            delta = np.float32(weight[0] / 2) * deltas[0] + np.float32(weight[1] / 2) * deltas[1]
        wanted = torch.from_numpy(origin + np.float32(0.75) * delta).to(tensor.dtype)
        assert torch.equal(out[name], wanted), name
    assert count == 14


def closed(deltas: Any, init: str = "sum", share: float | None = None) -> Any:
    return literal_closed(deltas, init, participation if share is None else partial(flow, share=share))


ON_ADAPTERS = {
    "tsv": (partial(literal_tsv, weight=(1, 1), count=1), {}),
    "iso_c": (literal_iso_c, {}),
    "iso_cts": (partial(literal_iso_cts, fraction=0.6), {"common_space_fraction": 0.6}),
    "optmerge": (partial(literal_optmerge, kept=3), {}),
    "swudi": (partial(closed, init="mean", share=0.65), {"init": "mean"}),
    "aswudi": (closed, {}),
    "dc_merge": (partial(literal_dc_merge, keep=0.001, smoothing="avg", kept=3), {}),
}


@pytest.mark.parametrize("method", ON_ADAPTERS)
def test_adapters_are_merged_as_their_updates_in_the_space_that_these_span(method: str, tmp_path: Path) -> None:
    """The space is found from the multiplied updates here, and from the factors there."""
    literal, said = ON_ADAPTERS[method]
    folders = [adapter(tmp_path / f"{seed}", seed) for seed in (1, 2)]
    out = exact_updates(merged(recipe(method, folders, said), tmp_path / "out"))
    both = [exact_updates(folder) for folder in folders]
    assert out.keys() == both[0].keys()
    for name, update in out.items():
        updates = np.stack([one[name] for one in both])
        left = np.linalg.svd(np.concatenate(list(updates), axis=1))[0][:, :6]
        right = np.linalg.svd(np.concatenate(list(updates)))[2][:6]
        wanted = 0.75 * left @ literal(left.T @ updates @ right.T) @ right
        assert away(update, wanted) < 1e-5, name


def test_the_size_of_the_update_does_not_matter_where_the_paper_counts_components(tmp_path: Path) -> None:
    """Of updates of rank r, min(out, in) // T components are r of them, so this is the dense computation as well."""
    folders = [adapter(tmp_path / f"{seed}", seed) for seed in (1, 2)]
    out = exact_updates(merged(recipe("optmerge", folders, {}), tmp_path / "out"))
    both = [exact_updates(folder) for folder in folders]
    for name, update in out.items():
        updates = np.stack([one[name] for one in both])
        assert away(update, 0.75 * literal_optmerge(updates, min(updates.shape[1:]) // 2)) < 1e-5


def test_adapters_that_share_what_they_read_and_ranks_that_differ(tmp_path: Path) -> None:
    one, same, other = (
        adapter(tmp_path / label, seed, r=rank)
        for label, seed, rank in (("one", 1, 3), ("same", 1, 3), ("other", 2, 5))
    )
    for method in ON_ADAPTERS:
        for place, pair in enumerate(((one, other), (one, same))):
            out = merged(recipe(method, pair, {}), tmp_path / f"{method} {place}")
            assert all(np.isfinite(update).all() for update in exact_updates(out).values())


def test_what_is_refused(models: list[Path], tmp_path: Path) -> None:
    folders = [adapter(tmp_path / f"{seed}", seed) for seed in (1, 2)]
    file = recipe_file(recipe("ip_merge", folders, {}), tmp_path / "recipe.yaml")
    assert "ip_merge works on checkpoints, not on adapters" in cli("plan", file).err
    file = recipe_file(recipe("ip_merge", models[1:2], {}, base_model=str(models[0])), tmp_path / "one.yaml")
    assert "ip_merge takes 2 models or more" in cli("plan", file).err
    file = recipe_file(recipe("iso_c", models[1:], {}), tmp_path / "no_base.yaml")
    assert "iso_c works on deltas and needs base_model" in cli("plan", file).err
