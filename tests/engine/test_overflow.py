"""Numbers too large for the output are counted as they are written, and refused unless the recipe allows them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import polymerge
from adapters_made import PEFT_WARNINGS, adapter
from polymerge.checkpoints.safetensors import read_safetensors
from polymerge.errors import CheckpointError, PolymergeError
from running import checkpoint, cli, leftovers, linear, recipe_file, small_llama, tensor
from tiny import build

pytestmark = PEFT_WARNINGS

ROLES = ("base", "one", "other")
NORM, DOWN = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"


def put(folder: Path, values: Mapping[str, tuple[slice, float]]) -> Path:
    """Put a number in some places of a checkpoint's tensors."""
    tensors = load_file(folder / "model.safetensors")
    for name, (places, value) in values.items():
        tensors[name].view(-1)[places] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def trio(folder: Path, dtype: str, large: float) -> dict[str, Any]:
    """A recipe that adds two deltas to a base; the norm of each has one large number, its `down_proj` has two."""
    names = {name: str(build("llama", folder / name, seed=seed, dtype=dtype)) for seed, name in enumerate(ROLES)}
    for name in ("one", "other"):
        put(folder / name, {NORM: (slice(1, 2), large), DOWN: (slice(2, 4), large)})
    return {
        "merge_method": "task_arithmetic",
        "template": names["one"],
        "base_model": names["base"],
        "models": [names["one"], names["other"]],
        "parameters": {"weight": 1},
    }


@pytest.mark.parametrize(("dtype", "large"), [("float16", 40000.0), ("bfloat16", 3e38), ("float32", 3e38)])
@pytest.mark.parametrize("block", [3, 1 << 20])
def test_an_overflow_is_refused_with_its_tensors_and_counts(
    dtype: str, large: float, block: int, tmp_path: Path
) -> None:
    recipe = trio(tmp_path, dtype, large)
    with pytest.raises(CheckpointError) as caught:
        polymerge.merge(recipe, tmp_path / "out", check=False, block=block)
    assert str(caught.value).startswith(
        "3 numbers in 2 tensors overflow in this merge: "
        f"'text.layers.0.mlp.down_proj.weight (2 too large for {dtype})', "
        f"'text.norm.weight (1 too large for {dtype})'. "
    )
    assert "overflow" in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == []


def test_what_the_recipe_names_is_allowed_recorded_and_told(tmp_path: Path) -> None:
    recipe = trio(tmp_path, "float16", 40000.0)
    with pytest.raises(CheckpointError, match=r"1 number in 1 tensor overflows in this merge: 'text\.norm\.weight"):
        polymerge.merge({**recipe, "overflow": ["*.mlp.*"]}, tmp_path / "out", check=False)
    allowed = {**recipe, "overflow": ["text.layers.*.mlp.*", "text.norm.weight"]}
    ran = cli("merge", recipe_file(allowed, tmp_path / "r.yaml"), "-o", tmp_path / "out")
    assert ran.status == 0, ran.err
    assert "3 numbers are infinite in the output, as overflow in the recipe allows" in ran.out + ran.err
    assert torch.isinf(tensor(tmp_path / "out", NORM)).sum() == 1
    record = json.loads((tmp_path / "out/polymerge.json").read_text())
    assert record["output"]["overflow"] == {NORM: 1, DOWN: 2}
    assert record["recipe"]["overflow"] == allowed["overflow"]
    again = polymerge.merge(record["recipe"], tmp_path / "again", check=False).folder
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_verify_knows_the_infinities_that_a_recipe_allowed_and_no_others(tmp_path: Path) -> None:
    recipe = trio(tmp_path, "float16", 40000.0)
    out = polymerge.merge({**recipe, "overflow": ["*"]}, tmp_path / "out", check=False).folder
    assert polymerge.verify(out).passed
    tensors = load_file(out / "model.safetensors")
    for name, place, value in ((NORM, 2, float("inf")), (DOWN, 5, float("nan")), ("lm_head.weight", 0, float("inf"))):
        damaged = {own: one.clone() for own, one in tensors.items()}
        damaged[name].view(-1)[place] = value
        save_file(damaged, out / "model.safetensors", {"format": "pt"})
        (values,) = [found for found in polymerge.verify(out).findings if found.check == "values"]
        assert values.passed is False
        assert name in values.detail


def test_nan_is_never_allowed(tmp_path: Path) -> None:
    # one delta is too large for float32, the other too small: their sum is no number
    recipe = {**trio(tmp_path, "float32", 1.0), "parameters": {"weight": 2}, "overflow": ["*"]}
    for name, value in (("one", 3e38), ("other", -3e38)):
        put(tmp_path / name, {DOWN: (slice(0, 3), value)})
    with pytest.raises(CheckpointError, match=r"'text\.layers\.0\.mlp\.down_proj\.weight \(3 of NaN\)'"):
        polymerge.merge(recipe, tmp_path / "out", check=False)


def test_a_live_model_refuses_it_as_well(tmp_path: Path) -> None:
    recipe = trio(tmp_path, "float16", 40000.0)
    with pytest.raises(CheckpointError, match="3 numbers in 2 tensors overflow"), polymerge.live(recipe):
        pytest.fail("it was merged")
    with polymerge.live({**recipe, "overflow": ["*"]}) as live:
        assert torch.isinf(live.model.state_dict()[NORM]).sum() == 1


def test_what_is_copied_keeps_its_bytes(tmp_path: Path) -> None:
    tensors = small_llama(0, torch.float16)
    tensors[NORM][1] = float("inf")
    one, other = checkpoint(tmp_path / "one", tensors), checkpoint(tmp_path / "other", small_llama(1, torch.float16))
    recipe = linear(one, other, exclude=["text.norm.weight"])
    out = polymerge.merge(recipe, tmp_path / "out", check=False).folder
    assert torch.isinf(tensor(out, NORM)).sum() == 1
    with pytest.raises(PolymergeError, match=r"NaN or infinity in 1 tensor\(s\), first model\.norm\.weight"):
        polymerge.merge(recipe, tmp_path / "checked")


def test_rows_that_are_copied_into_a_merged_tensor_are_checked_at_the_end(tmp_path: Path) -> None:
    tensors = small_llama(0, torch.float16, rows=9)
    tensors["model.embed_tokens.weight"][8, 0] = float("inf")
    one, other = checkpoint(tmp_path / "one", tensors), checkpoint(tmp_path / "other", small_llama(1, torch.float16))
    with pytest.raises(PolymergeError, match=r"NaN or infinity in 1 tensor\(s\), first model\.embed_tokens\.weight"):
        polymerge.merge(linear(one, other, vocab="overlap"), tmp_path / "out")


def test_no_number_that_was_computed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (build("llama", tmp_path / str(seed), seed=seed) for seed in (1, 2))
    read: list[str] = []
    monkeypatch.setattr(
        "polymerge.engine.findings.Files.blocks", lambda _, entry, __: read.append(entry.name) or iter(())
    )
    out = polymerge.merge(linear(one, other, exclude=["text.norm.weight"]), tmp_path / "out").folder
    assert read == [NORM]
    polymerge.verify(out)
    assert sorted(read[1:]) == sorted(entry.name for entry in read_safetensors(out / "model.safetensors"))


@pytest.mark.parametrize("space", ["delta", "factors"])
def test_factors_of_adapters_are_counted_too(space: str, tmp_path: Path) -> None:
    folders = []
    for seed in (1, 2):
        folder = adapter(tmp_path / str(seed), seed, torch.float16)
        tensors = load_file(folder / "adapter_model.safetensors")
        factor: Tensor = tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
        factor.fill_(60000.0)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        folders.append(folder)
    parameters = {"weight": 2.0, "normalize": False, "space": space, "rank": 6 if space == "delta" else 3}
    recipe = {"merge_method": "linear", "models": list(map(str, folders)), "parameters": parameters}
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj \(\d+ too large for float16\)"):
        polymerge.merge(recipe, tmp_path / "out", check=False)
    out = polymerge.merge({**recipe, "overflow": ["*layers.1.*"]}, tmp_path / "out", check=False).folder
    assert sum(json.loads((out / "polymerge.json").read_text())["output"]["overflow"].values()) > 0
    assert [found.passed for found in polymerge.verify(out).findings if found.check == "values"] == [True]


@pytest.mark.parametrize("adapters", [False, True])
def test_a_glob_that_matches_nothing_is_a_mistake(adapters: bool, tmp_path: Path) -> None:
    models = [
        adapter(tmp_path / str(seed), seed) if adapters else checkpoint(tmp_path / str(seed), small_llama(seed))
        for seed in (1, 2)
    ]
    with pytest.raises(PolymergeError, match=r"recipe: overflow: 'text\.nrom\.\*' matches no"):
        polymerge.plan(linear(*models, overflow=["text.nrom.*"]))
