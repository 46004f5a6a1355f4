"""Methods that need whole matrices: each is read, merged and written whole, wherever it lies; the rest is averaged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import matrix_methods
import polymerge
from adapters_made import PEFT_WARNINGS, adapter, exact_updates
from matrix_methods import ROW, known, levelled
from polymerge.checkpoints.loading import load_model
from polymerge.engine.device import Torch
from polymerge.engine.matrix_merger import KeptDeltas
from polymerge.engine.pool import Pool
from polymerge.errors import CheckpointError, RecipeError, Refused
from polymerge.inference.live import LiveModel
from polymerge.methods.method import method_function
from polymerge.methods.table import METHODS
from polymerge.planning.matrix_costs import decomposed
from running import checkpoint, cli, merged, raw, recipe_file, same_weights
from tiny import as_2024, as_live, build, generate, load, perturbed, related_llm
from tiny_experts import apart

pytestmark = PEFT_WARNINGS


@pytest.fixture(autouse=True)
def method() -> Iterator[None]:
    with known(ROW):
        yield


def asked(base: Path, models: Sequence[Path], weight: Sequence[float] = (1.0, 0.5), **more: Any) -> dict[str, Any]:
    entries = [
        {"model": str(model), "parameters": {"weight": number}} for model, number in zip(models, weight, strict=True)
    ]
    return {"merge_method": "levelled", "base_model": str(base), "models": entries, **more}


def literal(base: Tensor, models: Sequence[Tensor], weight: Sequence[float], scale: float, whole: bool) -> Tensor:
    """Base plus scale times the merged delta, rounded once."""
    origin = base.float().numpy()
    deltas = np.stack([model.float().numpy() - origin for model in models])
    if whole:
        merged = levelled(deltas, weight)
    else:
        merged = np.zeros_like(origin)
        for number, delta in zip(weight, deltas, strict=True):
            merged = merged + np.float32(number / len(models)) * delta
    return torch.from_numpy(np.asarray(origin + np.float32(scale) * merged)).to(base.dtype)


def fails(_: Any, **given: Any) -> Any:
    assert given.keys() == {"weight", "share"}
    raise np.linalg.LinAlgError("SVD did not converge")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two fine-tunes of it."""
    folder = tmp_path_factory.mktemp("models")
    base = build("llama", folder / "base")
    return [base, *(perturbed(base, folder / f"tuned{seed}", seed=seed) for seed in (1, 2))]


def test_matrices_are_merged_whole_and_the_rest_is_averaged(models: list[Path], tmp_path: Path) -> None:
    base, *tuned = models
    out = load(merged(asked(base, tuned, parameters={"scale": 0.75}), tmp_path / "out"))
    before, after = load(base), [load(model) for model in tuned]
    whole = {name for name, tensor in before.items() if tensor.ndim == 2 and "embed" not in name and "head" not in name}
    assert len(whole) == 14
    for name, tensor in before.items():
        wanted = literal(tensor, [model[name] for model in after], (1.0, 0.5), 0.75, name in whole)
        assert torch.equal(out[name], wanted), name


def test_nothing_depends_on_blocks_or_threads(models: list[Path], tmp_path: Path) -> None:
    base, *tuned = models
    plan = polymerge.plan(asked(base, tuned))
    for threads, block in ((1, 1 << 19), (4, 1 << 19), (3, 100), (1, 7)):
        polymerge.merge(plan, tmp_path / f"{threads} {block}", threads=threads, block=block, check=False)
    results = [raw(folder) for folder in sorted(tmp_path.iterdir())]
    assert all(result == results[0] for result in results[1:])


def test_a_loaded_model_gets_the_same_bits(models: list[Path], tmp_path: Path) -> None:
    base, *tuned = models
    live = LiveModel(polymerge.plan(asked(base, tuned)))
    for weight in ((1.0, 0.5), (0.25, -1.0)):
        plan = polymerge.plan(asked(base, tuned, weight))
        out = polymerge.merge(plan, tmp_path / f"{weight[0]}", check=False).folder
        live.set(plan)
        same_weights(live.model, load_model(out))


def test_torch_gives_the_device_the_same_numbers(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *tuned = models
    plan = polymerge.plan(asked(base, tuned))
    polymerge.merge(plan, tmp_path / "here", check=False)
    monkeypatch.setattr("polymerge.engine.merge.open_device", lambda _: Torch("cpu"))
    polymerge.merge(plan, tmp_path / "torch", check=False, block=1000)
    assert raw(tmp_path / "torch") == raw(tmp_path / "here")


def test_a_search_of_the_scale_decomposes_each_matrix_once(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(matrix_methods, "CALLED", [calls.append])
    base, *tuned = models
    live = LiveModel(polymerge.plan(asked(base, tuned)))
    cases = [(1.0, 1.0, 14), (0.5, 1.0, 0), (-2.0, 1.0, 0), (0.5, 0.25, 14), (1.0, 1.0, 14)]
    for place, (scale, weight, made) in enumerate(cases):
        plan = polymerge.plan(asked(base, tuned, (weight, 0.5), parameters={"scale": scale}))
        calls.clear()
        live.set(plan)
        assert len(calls) == made
        same_weights(live.model, load_model(polymerge.merge(plan, tmp_path / f"{place}").folder))


def test_deltas_are_kept_as_far_as_there_is_room() -> None:
    kept, made = KeptDeltas(100), []

    def of(key: str, size: int) -> Any:
        return kept.of(key, lambda: made.append(key) or np.full(size, ord(key), np.float32))

    for _ in range(2):
        kept.begin()
        for key, size in (("a", 10), ("b", 20), ("c", 15)):  # 40, 80 and 60 bytes
            one = of(key, size)
            assert one.tolist() == [ord(key)] * size
            one[:] = 0  # of no consequence
    assert made == ["a", "b", "c", "b"]
    kept.begin()
    of("b", 20)
    kept.begin()  # which gives up what it did not use
    of("b", 20)
    assert made[4:] == ["b", "b"]
    kept.begin()
    of("b", 20)
    assert made[6:] == []


@pytest.mark.parametrize("method", ["iso_c", "tsv"])
def test_a_device_decomposes_what_it_can(
    method: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *tuned = map(str, models)
    plan = polymerge.plan({"merge_method": method, "base_model": base, "models": [{"model": one} for one in tuned]})
    here = load(polymerge.merge(plan, tmp_path / "here", check=False).folder)
    monkeypatch.setattr("polymerge.engine.merge.open_device", lambda _: Torch("cpu"))
    seen: list[type] = []
    function = method_function(METHODS[method])

    def called(deltas: Any, **given: Any) -> Any:
        seen.append(type(deltas))
        return function(deltas, **given)

    monkeypatch.setattr("polymerge.engine.matrix_merger.method_function", lambda _: called)
    there = load(polymerge.merge(plan, tmp_path / "there", check=False).folder)
    assert set(seen) == {Tensor}
    for name, tensor in here.items():  # nearly all to the bit: a last digit of bfloat16 may be rounded the other way
        assert (there[name] != tensor).float().mean() < 0.01, name
        assert torch.allclose(there[name].float(), tensor.float(), rtol=2**-7, atol=1e-6)


def test_how_experts_lie_does_not_matter(tmp_path: Path) -> None:
    vlm = build("qwen3_vl_moe", tmp_path / "vlm")
    base = related_llm(vlm, tmp_path / "base", seed=1)
    tuned = perturbed(base, tmp_path / "tuned", seed=2)
    results = []
    for place in range(2):
        if place:
            as_2024(vlm)
            as_live(tuned)
        said = asked(base, (vlm, tuned), template=str(vlm), exclude=["*.layers.0.mlp.experts.1.*"])
        plan = polymerge.plan(said)
        found = [matrices for piece, matrices in decomposed(plan) if ".experts." in piece.canonical]
        assert {(one.count, one.rows, one.columns, one.models) for one in found} == {(1, 24, 32, 2), (1, 32, 24, 2)}
        assert len(found) == 9
        for block in (1 << 19, 100):
            out = tmp_path / f"out {place} {block}"
            polymerge.merge(plan, out, threads=3, block=block, check=False)
            results.append(apart(load(out)))
    for result in results[1:]:
        assert result.keys() == results[0].keys()
        assert all(torch.equal(tensor, results[0][name]) for name, tensor in result.items())


@pytest.mark.parametrize("family", ["qwen2_vl", "internvl"])
def test_multimodal_models_load_and_their_kernels_are_averaged(family: str, tmp_path: Path) -> None:
    base = build(family, tmp_path / "base")
    tuned = [perturbed(base, tmp_path / f"tuned{seed}", seed=seed) for seed in (1, 2)]
    said = {"merge_method": "iso_c", "base_model": str(base), "models": [{"model": str(one)} for one in tuned]}
    out = load(merged({**said, "parameters": {"scale": 0.5}}, tmp_path / "out"))  # which is verified
    before, (one, two) = load(base), map(load, tuned)
    kernels = {name for name, tensor in before.items() if tensor.ndim > 2}
    matrices = {piece.canonical for piece, _ in decomposed(polymerge.plan(said))}
    assert kernels
    assert {name.partition(".")[0] for name in matrices} == {"text", "vision", "projector"}
    for name in kernels:
        assert torch.equal(out[name], literal(before[name], [one[name], two[name]], (1.0, 1.0), 0.5, False)), name
    generate(tmp_path / "out", tokens=1)


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def odd(seed: int) -> Mapping[str, Tensor]:
    """What an unknown model may have: experts in one tensor, kernels, a row, nothing at all, float64."""
    return {
        "blocks.0.experts.up": numbers(seed, 3, 5, 4),
        "blocks.0.conv": numbers(seed + 1, 5, 4, 3),
        "blocks.0.patches": numbers(seed + 2, 5, 3, 2, 2),
        "blocks.0.gate": numbers(seed + 3, 1, 6),
        "blocks.0.none": torch.empty(0, 4),
        "blocks.0.factor": numbers(seed + 4),
        "blocks.0.wide": numbers(seed + 5, 6, 9, dtype=torch.float64),
        "blocks.0.weight": numbers(seed + 6, 9, 6, dtype=torch.float16),
    }


def test_each_expert_is_a_matrix_and_a_kernel_is_none(tmp_path: Path) -> None:
    base, one, two = (checkpoint(tmp_path / str(seed), odd(seed), {"model_type": "odd"}) for seed in (0, 100, 200))
    said = asked(base, (one, two))
    out, before, after = load(merged(said, tmp_path / "out", "--no-verify")), odd(0), [odd(100), odd(200)]
    for expert in range(3):
        name = "blocks.0.experts.up"
        wanted = literal(before[name][expert], [model[name][expert] for model in after], (1.0, 0.5), 1.0, True)
        assert torch.equal(out[name][expert], wanted)
    for name in ("conv", "patches", "gate", "none", "factor", "weight"):
        own = f"blocks.0.{name}"
        wanted = literal(before[own], [model[own] for model in after], (1.0, 0.5), 1.0, name == "weight")
        assert torch.equal(out[own], wanted), name
    wide = "blocks.0.wide"
    deltas = np.stack([(model[wide] - before[wide]).numpy() for model in after])
    assert torch.equal(out[wide], before[wide] + torch.from_numpy(levelled(deltas, (1.0, 0.5))))
    sizes = {piece.canonical: matrices.size for piece, matrices in decomposed(polymerge.plan(said))}
    assert sizes == {"blocks.0.experts.up": 4, "blocks.0.wide": 8, "blocks.0.weight": 4}


def test_tokens_are_no_directions_and_a_tied_head_stays_equal(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", tie=True)
    tuned = [perturbed(base, tmp_path / f"{seed}", seed=seed) for seed in (1, 2)]
    for folder in (base, *tuned):  # stored twice although the config ties them
        tensors = load(folder)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    out = load(merged(asked(base, tuned), tmp_path / "out"))
    assert torch.equal(out["lm_head.weight"], out["model.embed_tokens.weight"])
    name = "model.embed_tokens.weight"
    wanted = literal(load(base)[name], [load(model)[name] for model in tuned], (1.0, 0.5), 1.0, False)
    assert torch.equal(out[name], wanted)


def test_a_matrix_that_cannot_be_decomposed_is_named(models: list[Path], tmp_path: Path) -> None:
    base, *tuned = models
    with known(replace(ROW, function=f"{__name__}:fails")), pytest.raises(CheckpointError) as error:
        polymerge.merge(asked(base, tuned), tmp_path / "out", check=False)
    assert "text.layers.0." in str(error.value)
    assert "levelled cannot decompose this matrix: SVD did not converge" in str(error.value)
    assert not (tmp_path / "out").exists()
    with (
        known(replace(ROW, function=f"{__name__}:too_small")),
        pytest.raises(ValueError, match=r"\[1, 1\] for deltas of"),
    ):
        polymerge.merge(asked(base, tuned), tmp_path / "out", check=False)


def too_small(deltas: Any, **_: Any) -> Any:
    return deltas[0][:1, :1]


def test_a_base_is_needed_and_a_plan_of_another_kind_is_refused(models: list[Path]) -> None:
    base, *tuned = models
    said = asked(base, tuned)
    with pytest.raises(Refused, match="levelled works on deltas and needs base_model"):
        polymerge.plan({name: value for name, value in said.items() if name != "base_model"})
    plan = polymerge.plan(said)
    written = plan.to_json()
    assert polymerge.plan(written) == plan
    for step in written["steps"]:
        if step["name"] == "model.norm.weight":
            step["pieces"][0]["setting"] = 0
    with pytest.raises(RecipeError, match=r"'model.norm.weight': levelled is for matrices"):
        polymerge.plan(written)


def test_the_plan_names_what_merges_the_rest(models: list[Path], tmp_path: Path) -> None:
    base, *tuned = models
    ran = cli("plan", recipe_file(asked(base, tuned, parameters={"scale": 0.5}), tmp_path / "recipe.yaml"))
    assert ran.status == 0, ran.err
    assert "[0] levelled (weight 1 tuned1, 0.5 tuned2; share 0.5; scale 0.5): 14 tensors; others: [1]" in ran.out
    assert "[1] task_arithmetic (weight 0.5 tuned1, 0.25 tuned2; normalize false; scale 0.5): 7 tensors" in ran.out


# --- adapters


def test_an_adapter_is_merged_by_its_core_as_its_updates_would_be(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / f"{seed}", seed, r=rank) for seed, rank in ((1, 2), (2, 3))]
    said = {"merge_method": "levelled", "models": [{"model": str(one), "parameters": {"weight": weight}}
            for one, weight in zip(folders, (1.0, -0.5), strict=True)], "parameters": {"scale": 0.5}}  # fmt: skip
    out = exact_updates(merged(said, tmp_path / "out"))
    one, two = (exact_updates(folder) for folder in folders)
    assert out.keys() == one.keys()
    for name, update in out.items():
        wanted = 0.5 * levelled(np.stack([one[name], two[name]]), (1.0, -0.5))
        assert np.linalg.norm(update - wanted) < 1e-6 * np.linalg.norm(wanted), name
        assert np.linalg.matrix_rank(update, tol=1e-5 * np.linalg.norm(update)) == 5
    with pytest.raises(Refused, match="levelled merges factors in its own way and takes no space"):
        polymerge.plan({**said, "parameters": {"space": "core"}})


# --- memory


def test_large_calls_wait_for_room() -> None:
    pool = Pool(3)
    pool.room = 10
    running: list[int] = []
    most: list[int] = []

    def call(room: int) -> None:
        running.append(room)
        most.append(sum(running))
        torch.linalg.svd(torch.ones(60, 60))
        running.remove(room)

    try:
        for room in (4, 6, 5, 5, 30, 1, 2, 3, 9, 1):
            pool.submit_large(room, room, call, room)
        pool.finish()
    finally:
        pool.close()
    assert len(most) == 10
    assert sorted(most)[-1] == 30
    assert sorted(most)[-2] <= 10
