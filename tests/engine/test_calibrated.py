"""`calibrate: svc`: of any method on deltas, the merged matrices are calibrated before they are scaled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import polymerge
from adapters_made import PEFT_WARNINGS, adapter, exact_updates, llama, tensors
from polymerge.checkpoints.loading import load_model
from polymerge.engine.device import Torch
from polymerge.errors import Refused
from polymerge.inference.live import LiveModel
from polymerge.planning.matrix_costs import decomposed
from running import cli, merged, raw, recipe_file, same_weights
from spectral import away, literal_svc
from tiny import build, load, perturbed

pytestmark = PEFT_WARNINGS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two fine-tunes of it."""
    folder = tmp_path_factory.mktemp("models")
    base = build("llama", folder / "base", dtype="float32")
    return [base, *(perturbed(base, folder / f"tuned{seed}", seed=seed) for seed in (1, 2))]


def recipe(models: Sequence[Path], method: str, base: Path | None = None, **said: Any) -> dict[str, Any]:
    weighed = method not in ("iso_c", "optmerge")
    entries = [{"model": str(one)} | ({"parameters": {"weight": 1.0}} if weighed else {}) for one in models]
    named = {"base_model": str(base)} if base else {}
    return {"merge_method": method, "models": entries, "parameters": said, **named}


def is_whole(name: str, shape: Sequence[int]) -> bool:
    return len(shape) == 2 and "embed" not in name and "head" not in name


METHODS = {
    "task_arithmetic": {},
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.5},
    "optmerge": {},
    "nuslerp": {},
    "ties over the model": {"density": 0.5, "trim": "model"},
}


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_a_checkpoint_s_matrices_are_calibrated_and_nothing_else(
    case: str, alpha: float | None, models: list[Path], tmp_path: Path
) -> None:
    base, *tuned = models
    method, said = case.partition(" ")[0], METHODS[case]
    plain = load(merged(recipe(tuned, method, base, **said), tmp_path / "plain"))
    more = {"calibrate": "svc"} | ({} if alpha is None else {"alpha": alpha})
    scale = {} if method == "nuslerp" else {"scale": 0.5}
    out = load(merged(recipe(tuned, method, base, **said, **more, **scale), tmp_path / "out"))
    half = load(merged(recipe(tuned, method, base, **said, **scale), tmp_path / "half"))
    before, after = load(base), [load(model) for model in tuned]
    for name, tensor in before.items():
        if not is_whole(name, tensor.shape):
            assert out[name].equal(half[name]), name
            continue
        origin = tensor.double().numpy()
        deltas = np.stack([model[name].double().numpy() - origin for model in after])
        wanted = literal_svc(plain[name].double().numpy() - origin, deltas, alpha or 1.0) * scale.get("scale", 1.0)
        assert away(out[name].double().numpy() - origin, wanted) < 2e-5, name


def test_nothing_depends_on_blocks_threads_or_device_and_plans_are_kept(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *tuned = models
    plan = polymerge.plan(recipe(tuned, "dare_ties", base, calibrate="svc", density=0.5))
    assert polymerge.plan(plan.to_json()) == plan
    for threads, block in ((1, 1 << 19), (3, 100)):
        polymerge.merge(plan, tmp_path / f"{threads}", threads=threads, block=block, check=False)
    assert raw(tmp_path / "1") == raw(tmp_path / "3")
    live = LiveModel(plan)
    live.set(plan)
    same_weights(live.model, load_model(tmp_path / "1"))
    monkeypatch.setattr("polymerge.engine.merge.open_device", lambda _: Torch("cpu"))
    polymerge.merge(plan, tmp_path / "torch", check=False)
    assert raw(tmp_path / "torch") == raw(tmp_path / "1")
    found = [matrices for _, matrices in decomposed(plan)]
    assert len(found) == 14
    assert all(matrices.calibrated and matrices.seconds > 0 for matrices in found)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("task_arithmetic", {}),
        ("optmerge", {}),
        ("ties", {"density": 0.5}),
        ("ties", {"density": 0.5, "space": "core"}),
    ],
)
def test_adapters_are_calibrated_as_their_updates(method: str, said: dict[str, Any], tmp_path: Path) -> None:
    folders = [adapter(tmp_path / f"{seed}", seed) for seed in (1, 2)]
    out = exact_updates(merged(recipe(folders, method, **said, calibrate="svc", scale=0.5), tmp_path / "out"))
    plain = exact_updates(merged(recipe(folders, method, **said), tmp_path / "plain"))
    both = [exact_updates(folder) for folder in folders]
    for name, update in out.items():
        rank = np.linalg.matrix_rank(plain[name], tol=1e-5)
        u, s, v = np.linalg.svd(plain[name], full_matrices=False)
        u, s, v = u[:, :rank], s[:rank], v[:rank]
        of_models = np.stack([u.T @ one[name] for one in both])
        projections = np.maximum(1, (s[:, None] * v * of_models).sum(2) / np.square(of_models).sum(2))
        assert away(update, 0.5 * (u * s * (2 / projections.sum(axis=0))) @ v) < 2e-5, name


def test_full_weights_beside_adapters_are_left_as_extra_makes_them(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / f"{seed}", seed, modules_to_save=["v_proj"]) for seed in (1, 2)]
    base = tmp_path / "base"
    llama().save_pretrained(base)
    said = {"extra": "task_arithmetic"}
    plain = tensors(merged(recipe(folders, "task_arithmetic", base, **said), tmp_path / "plain"))
    out = tensors(merged(recipe(folders, "task_arithmetic", base, **said, calibrate="svc"), tmp_path / "out"))
    assert out.keys() == plain.keys()
    for name, tensor in plain.items():
        assert out[name].equal(tensor) == ("lora_" not in name), name


def test_what_is_refused(models: list[Path], tmp_path: Path) -> None:
    base, *tuned = models
    with pytest.raises(Refused, match="linear has no parameter 'calibrate'"):
        polymerge.plan(recipe(tuned, "linear", calibrate="svc"))
    with pytest.raises(Refused, match=r"calibrate of ties cannot be 'svd'\. Did you mean 'svc'"):
        polymerge.plan(recipe(tuned, "ties", base, calibrate="svd"))
    with pytest.raises(Refused, match="alpha of ties has to be from 1e-06"):
        polymerge.plan(recipe(tuned, "ties", base, calibrate="svc", alpha=0))
    with pytest.raises(Refused, match="iso_c: all directions of its delta are equally strong"):
        polymerge.plan(recipe(tuned, "iso_c", base, calibrate="svc"))
    with pytest.raises(Refused, match="calibrate is set twice, the second time in parameters"):
        polymerge.plan(recipe(tuned, "ties", base, calibrate="svc") | {"calibrate": "svc"})
    above = polymerge.plan(recipe(tuned, "ties", base, alpha=0.5) | {"calibrate": "svc"})
    assert above.settings == polymerge.plan(recipe(tuned, "ties", base, alpha=0.5, calibrate="svc")).settings
    plain = polymerge.plan(recipe(tuned, "ties", base))
    assert polymerge.plan(recipe(tuned, "ties", base, calibrate=None)).settings == plain.settings
    file = recipe_file(recipe(tuned, "ties", base, calibrate="svc"), tmp_path / "recipe.yaml")
    assert "calibrate svc; alpha 1): 14 tensors; others: [1]" in cli("plan", file).out
