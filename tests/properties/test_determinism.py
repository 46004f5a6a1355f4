"""The same bits every time: threads, blocks, shards, hash seeds and devices change nothing, the seed changes draws."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import polymerge
from polymerge.engine.device import Device, Torch
from polymerge.methods.table import METHODS
from running import checkpoint, raw, recipe_file, weights

PROGRAM = Path(sys.executable).with_name("polymerge")

SHAPES = {
    "model.embed_tokens.weight": (1009, 131),  # more than one cell of `dots`, and no multiple of anything
    "model.layers.0.mlp.up_proj.weight": (333, 97),
    "model.layers.0.input_layernorm.weight": (97,),
    "model.norm.weight": (1,),
    "lm_head.weight": (7, 131),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "parameters": {"weight": 0.3}},
    "ties": {"merge_method": "ties", "parameters": {"weight": 0.5, "density": 0.3}},
    "ties, whole models": {"merge_method": "ties", "parameters": {"weight": 0.5, "density": 0.3, "trim": "model"}},
    "dare_ties": {"merge_method": "dare_ties", "parameters": {"weight": 0.5, "density": 0.4}},
    "della": {"merge_method": "della", "parameters": {"weight": 0.5, "density": 0.4}},
    "arcee_fusion": {"merge_method": "arcee_fusion"},
    "slerp": {"merge_method": "slerp", "parameters": {"t": 0.3}},
    "other dtype": {"merge_method": "linear", "parameters": {"weight": 3}, "dtype": "float32", "exclude": ["*norm*"]},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    base = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for name, shape in SHAPES.items()}
    made = {}
    for seed, label in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        own = {
            name: (tensor + seed * 0.01 * torch.randn(tensor.shape, generator=generator)).bfloat16()
            for name, tensor in base.items()
        }
        made[label] = checkpoint(folder / label, own)
    return made


def recipe(models: dict[str, Path], name: str) -> dict[str, Any]:
    labels = ["a"] if METHODS[SETTINGS[name]["merge_method"]].models == 1 else ["a", "b"]
    asked = {"template": str(models["a"]), "models": [str(models[one]) for one in labels], **SETTINGS[name]}
    return asked if asked["merge_method"] == "linear" else {**asked, "base_model": str(models["base"])}


@pytest.fixture(scope="module")
def expected(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """The weight files of every setting by one thread, each tensor in one block."""
    folder = tmp_path_factory.mktemp("expected")
    return {
        name: weights(polymerge.merge(recipe(models, name), folder / name, check=False, threads=1).folder)
        for name in SETTINGS
    }


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("threads", "block"), [(1, 997), (2, 1024), (3, 65_537), (2, 131_072), (5, 10**9)])
def test_threads_and_blocks(
    name: str, threads: int, block: int, models: dict[str, Path], expected: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    made = polymerge.merge(recipe(models, name), tmp_path / "out", check=False, threads=threads, block=block)
    assert weights(made.folder) == expected[name]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("block", [1 << 18, 30_011])
def test_torch_computes_the_same_bits(
    name: str,
    block: int,
    models: dict[str, Path],
    expected: dict[str, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[str] = []

    def open_torch(name: str) -> Device:
        opened.append(name)
        return Torch("cpu")

    monkeypatch.setattr("polymerge.engine.merge.open_device", open_torch)
    made = polymerge.merge(recipe(models, name), tmp_path / "out", check=False, threads=2, block=block)
    assert opened == ["cpu"]
    assert weights(made.folder) == expected[name]


@pytest.mark.parametrize("name", ["ties, whole models", "dare_ties"])
def test_the_size_of_shards(
    name: str, models: dict[str, Path], expected: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    whole = polymerge.merge(recipe(models, name), tmp_path / "whole", check=False).folder
    assert weights(whole) == expected[name]
    for size in ("1KB", "70KB"):
        split = polymerge.merge(recipe(models, name), tmp_path / size, check=False, shard_size=size).folder
        assert len(weights(split)) > 2
        assert raw(split) == raw(whole)


def sharded(model: Path, folder: Path, order: list[int]) -> Path:
    """The tensors of a checkpoint, two a shard, the shards numbered in another order."""
    tensors = dict(sorted(torch_tensors(model).items()))
    folder.mkdir()
    (folder / "config.json").write_text((model / "config.json").read_text())
    groups = [list(tensors)[start : start + 2] for start in (0, 2, 4)]
    weight_map = {}
    for group, number in zip(groups, order, strict=True):
        file = f"model-{number:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in group}, folder / file)
        weight_map |= dict.fromkeys(group, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def torch_tensors(model: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(model / "model.safetensors")


@pytest.mark.parametrize("name", ["ties, whole models", "dare_ties"])
def test_the_order_of_shards(
    name: str, models: dict[str, Path], expected: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    for number, order in enumerate(([1, 2, 3], [3, 1, 2])):
        turned = {label: sharded(model, tmp_path / f"{label}{number}", order) for label, model in models.items()}
        others = {**turned, "a": models["a"]}
        same_template = polymerge.merge(recipe(others, name), tmp_path / f"out{number}", check=False).folder
        assert weights(same_template) == expected[name]
        every = polymerge.merge(recipe(turned, name), tmp_path / f"every{number}", check=False).folder
        assert raw(every) == raw(same_template)


def test_the_hash_seed_and_the_time_of_day(models: dict[str, Path], tmp_path: Path) -> None:
    asked = recipe_file(recipe(models, "dare_ties"), tmp_path / "recipe.yaml")
    outputs, plans = [], []
    for seed in "012":
        out = tmp_path / seed / "out"
        out.parent.mkdir()
        command = [PROGRAM, "merge", asked, "-o", out, "--no-verify"]
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True, timeout=60)
        outputs.append({**weights(out), "card": (out / "README.md").read_bytes()})
        plans.append(json.loads((out / "polymerge.json").read_text())["plan_hash"])
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(set(plans)) == 1


@pytest.mark.parametrize(("method", "differs"), [("dare_ties", True), ("dare_linear", True), ("ties", False)])
def test_only_draws_depend_on_the_seed(method: str, differs: bool, models: dict[str, Path], tmp_path: Path) -> None:
    asked = {**recipe(models, "ties"), "merge_method": method}
    one, other, again = (
        polymerge.merge({**asked, "seed": seed}, tmp_path / str(place), check=False).folder
        for place, seed in enumerate((1, 2, 1))
    )
    assert weights(one) == weights(again)
    assert (weights(one) != weights(other)) == differs


def test_models_draw_apart_and_tensors_do_too(models: dict[str, Path], tmp_path: Path) -> None:
    """One model twice: if both drew alike, the sum of two halves would be that of one."""
    asked = {
        "merge_method": "dare_linear",
        "models": [str(models["a"])] * 2,
        "base_model": str(models["base"]),
        "parameters": {"weight": 0.5, "density": 0.5, "rescale": False},
        "dtype": "float32",
    }
    twice = torch_tensors(polymerge.merge(asked, tmp_path / "out", check=False).folder)["model.embed_tokens.weight"]
    base, own = (torch_tensors(models[label])["model.embed_tokens.weight"].float() for label in ("base", "a"))
    moved = own != base
    kept = ((twice - base) / (own - base))[moved]
    shares = [float(((kept - share).abs() < 0.1).float().mean()) for share in (0, 0.5, 1)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.02)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_plan_that_was_written_down_gives_the_same(
    name: str, models: dict[str, Path], expected: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    plan = polymerge.plan(recipe(models, name))
    read_again = polymerge.plan(json.loads(json.dumps(plan.to_json())))
    assert read_again.hash == plan.hash
    assert weights(polymerge.merge(read_again, tmp_path / "out", check=False).folder) == expected[name]
