"""Adapters that trained different things of a module: full weights, biases and factors side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_made import PEFT_WARNINGS, PREFIX, adapter, config, llama, loaded, recipe, tensors
from polymerge.engine.verify import verify
from running import cli, merged, recipe_file

pytestmark = PEFT_WARNINGS


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    """Every parameter of the base with an adapter folded in by PEFT."""
    return {name: value.detach() for name, value in loaded(folder).merge_and_unload().named_parameters()}


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_reach_peft(tmp_path: Path, bias: str) -> None:
    one, other = (adapter(tmp_path / name, seed, bias=bias) for seed, name in enumerate(("one", "other")))
    alone = merged(recipe("linear", [one]), tmp_path / "alone")
    assert {name: value.numpy().tobytes() for name, value in tensors(alone).items()} == {
        name: value.numpy().tobytes() for name, value in tensors(one).items()
    }
    both = parameters(
        merged(
            recipe("linear", [one, other], 0.5),
            tmp_path / "both",
        )
    )
    ours, theirs, base = parameters(one), parameters(other), dict(llama().named_parameters())
    name = "model.layers.0.self_attn.q_proj.bias"
    assert not torch.equal(ours[name], base[name])
    torch.testing.assert_close(both[name], (ours[name] + theirs[name]) / 2)


def test_a_bias_is_named_by_what_the_output_adapts(tmp_path: Path) -> None:
    """One trains all biases and adapts q, the other adapts k: k's bias then belongs to a module with factors."""
    one = adapter(tmp_path / "one", 1, bias="all")
    other = adapter(tmp_path / "other", 2, target_modules=["k_proj"])
    for place, order in enumerate(([one, other], [other, one])):
        both = parameters(merged(recipe("cat", order), tmp_path / f"out{place}"))
        name = "model.layers.1.self_attn.k_proj.bias"
        torch.testing.assert_close(both[name], parameters(one)[name])


def test_verify_finds_a_weight_that_peft_would_not(tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", 1, bias="lora_only")
    file = one / "adapter_model.safetensors"
    held = {name.replace(".base_layer.", "."): value for name, value in load_file(file).items()}
    save_file(held, file)
    found = {finding.check: finding for finding in verify(one).findings}
    assert found["names"].passed is False
    assert "are not in base_layer" in found["names"].detail


FULL, FACTORS = {"modules_to_save": ["embed_tokens"]}, {"target_modules": ["q_proj", "embed_tokens"]}
ROWS = {"trainable_token_indices": [1, 2]}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((FULL, FACTORS), ("has trained it in full", "has LoRA on it")),
        ((FULL, ROWS), ("has trained it in full", "has trained rows of it")),
        ((FACTORS, ROWS), ("has LoRA on it", "has trained rows of it")),
    ],
)
def test_what_is_trained_in_two_ways_does_not_mix(
    settings: tuple[dict[str, Any], dict[str, Any]], said: tuple[str, str], tmp_path: Path
) -> None:
    one, other = (adapter(tmp_path / name, **given) for name, given in zip(("one", "other"), settings, strict=True))
    for first, second, words in ((one, other, said), (other, one, said[::-1])):
        ran = cli("plan", recipe_file(recipe("cat", [first, second]), tmp_path / "recipe.yaml"))
        assert ran.status == 2
        assert f"model.embed_tokens.weight: '{first.name}' {words[0]}, '{second.name}' {words[1]}. Fold both" in ran.err


@pytest.mark.parametrize("rank", [20, 21])
def test_a_copied_module_keeps_a_scaling_that_no_alpha_gives_exactly(tmp_path: Path, rank: int) -> None:
    one = adapter(tmp_path / "one", 1)
    rooted = adapter(tmp_path / "rooted", 2, target_modules=["v_proj"], r=rank, lora_alpha=8, use_rslora=True)
    out = merged(recipe("cat", [one, rooted]), tmp_path / "out")
    name = "model.layers.0.self_attn.v_proj"
    own, kept = tensors(rooted), tensors(out)
    for end in ("lora_A.weight", "lora_B.weight"):
        assert torch.equal(own[f"{name}.{end}"], kept[f"{name}.{end}"])
    scaling = loaded(out).get_submodule(PREFIX + name).scaling["default"]
    assert scaling == pytest.approx(8 / rank**0.5, rel=2**-52)
    assert None not in config(out)["alpha_pattern"].values()


def test_a_base_that_has_no_such_modules_is_refused(tmp_path: Path) -> None:
    one, other = adapter(tmp_path / "one", 1), adapter(tmp_path / "other", 2)
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    llama().save_pretrained(right)
    llama().save_pretrained(wrong)
    held = {name: value for name, value in load_file(wrong / "model.safetensors").items() if "layers.1" not in name}
    save_file(held, wrong / "model.safetensors")
    said = recipe("cat", [one, other], base_model=str(right))
    assert cli("plan", recipe_file(said, tmp_path / "recipe.yaml")).status == 0
    ran = cli("plan", recipe_file(said | {"base_model": str(wrong)}, tmp_path / "recipe.yaml"))
    assert ran.status == 2
    assert "has no model.layers.1.self_attn.q_proj of [16, 16] (out, in), which 'one' is for" in ran.err


def test_a_wrong_path_is_called_one(tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", 1)
    ran = cli("plan", recipe_file(recipe("cat", [one, tmp_path / "on"]), tmp_path / "recipe.yaml"))
    assert ran.status == 2
    assert "there is no such file or folder. Did you mean 'one'?" in ran.err
    other = adapter(tmp_path / "other", 2)
    (other / "adapter_config.json").unlink()
    ran = cli("plan", recipe_file(recipe("cat", [one, other]), tmp_path / "recipe.yaml"))
    assert "adapter_config.json" in ran.err


def test_a_rank_that_cannot_be_filled_is_told(tmp_path: Path) -> None:
    one, other = adapter(tmp_path / "one", 1), adapter(tmp_path / "other", 2)
    said = recipe("svd", [one, other], parameters={"rank": 1000})
    ran = cli("plan", recipe_file(said, tmp_path / "recipe.yaml"))
    assert "rank: 1000 exceeds what some modules" in ran.out
    out = merged(said, tmp_path / "out")
    assert config(out)["r"] == 6
    report = json.loads((out / "polymerge.json").read_text())["output"]
    assert np.max(list(report["relative_error"].values())) == 0
