"""LoRA of experts that are one tensor, folded: PEFT's own sum, wherever the experts of the base lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import polymerge
from adapters_made import PEFT_WARNINGS
from expert_adapters import PARAMETERS, as_before_019, gemma4, linear_modules, merged_by_peft, on_experts, qwen3_5
from folded import SAME_WEIGHTS, check, learned, merged_everywhere, trained
from fp8_made import quantized
from polymerge.families.expressions import Adapted, LowRank, Read, Rows, Stacked, expr_from_json, expr_to_json
from running import cli, fold, raw
from tiny import build, loaded
from tiny_experts import in_one, one_by_one

pytestmark = PEFT_WARNINGS

LYING = [
    ("qwen3_moe", "one by one"),
    ("qwen3_moe", "in one"),
    ("mixtral", "one by one"),
    ("qwen3_vl_moe", "in one"),
    ("qwen3_vl_moe", "transposed"),
]
SETTINGS: dict[str, dict[str, Any]] = {
    "both": {},
    "both, of other ranks": {
        "rank_pattern": {"experts.down_proj": 2},
        "alpha_pattern": {"experts.gate_up_proj": 7},
        "use_rslora": True,
    },
    "one": {"target_parameters": ["experts.down_proj"]},
    "alone": {"target_modules": []},
    "with the router": {"target_parameters": [*PARAMETERS, "mlp.gate.weight"]},
}


def laid(family: str, lying: str, folder: Path) -> Path:
    base = build(family, folder, seed=0, dtype="float32")
    if family != "mixtral":
        return one_by_one(base) if lying == "one by one" else in_one(base, transposed=lying == "transposed")
    return base


# --- against PEFT


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("family", "lying"), LYING)
def test_folded_experts_are_those_that_peft_merges(family: str, lying: str, settings: str, tmp_path: Path) -> None:
    base = laid(family, lying, tmp_path / "base")
    given = {"target_modules": ["q_proj"], "target_parameters": list(PARAMETERS)} | SETTINGS[settings]
    case = trained(base, tmp_path / "adapter", **given)
    out = fold(base, case.adapter, tmp_path / "out")
    changed = check(case, out, apart=lying == "one by one")
    assert any("experts" in name for name in changed)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("make", [qwen3_5, gemma4])
def test_every_linear_layer_of_families_of_this_year(make: Any, experts: bool, tmp_path: Path) -> None:
    """Linear attention, inputs for each layer, shared experts: all that PEFT can adapt there."""
    base = make(tmp_path / "base", experts=experts)
    names = ["experts.gate_up_proj", "experts.down_proj"] if experts else None
    learned(base, tmp_path / "adapter", target_modules=linear_modules(base), target_parameters=names)
    out = fold(base, tmp_path / "adapter", tmp_path / "out")
    wanted, before = merged_by_peft(base, tmp_path / "adapter"), merged_by_peft(base, None)
    found = loaded(out).state_dict()
    moved = {name for name, tensor in wanted.items() if not torch.equal(tensor, before[name])}
    kinds = ("in_proj_qkv", "out_proj") if make is qwen3_5 else ("input_proj", "o_proj")
    assert all(any(kind in name for name in moved) for kind in (*kinds, *(["gate_up_proj"] if experts else [])))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, **SAME_WEIGHTS)


@pytest.mark.parametrize(("family", "lying"), LYING)
def test_the_layout_of_peft_018_has_the_same_bits(family: str, lying: str, tmp_path: Path) -> None:
    base = laid(family, lying, tmp_path / "base")
    new = on_experts(base, tmp_path / "new", rank_pattern={"experts.down_proj": 2})
    old = as_before_019(new, tmp_path / "old")
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in load_file(one / "adapter_model.safetensors").items()}
        for one in (new, old)
    ]
    assert shapes[0] != shapes[1]
    assert raw(fold(base, new, tmp_path / "out")) == raw(fold(base, old, tmp_path / "again"))


def test_a_square_matrix_is_as_the_other_one_of_its_module(tmp_path: Path) -> None:
    base = build("qwen3_moe", tmp_path / "base", seed=0, dtype="float32")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 32}), encoding="utf-8")
    held = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name in held:
        if ".experts." in name:  # of 32 x 32, so that down_proj is square
            held[name] = torch.randn(32, 32, generator=generator)
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    new = on_experts(base, tmp_path / "new")
    old = as_before_019(new, tmp_path / "old")
    out = fold(base, new, tmp_path / "out")
    found, wanted = loaded(out).state_dict(), merged_by_peft(base, new)
    assert all(torch.allclose(found[name], wanted[name], **SAME_WEIGHTS) for name in wanted)
    assert raw(out) == raw(fold(base, old, tmp_path / "again"))
    alone = on_experts(base, tmp_path / "alone", target_parameters=["experts.down_proj"])
    assert cli("fold", alone, "--base", base, "-o", tmp_path / "one").status == 0
    ran = cli("fold", as_before_019(alone, tmp_path / "alone_old"), "--base", base, "-o", tmp_path / "two")
    assert ran.status == 2
    assert "is square, and PEFT before 0.19 did not say which of its factors is the output's" in ran.err


def test_lora_of_single_experts_is_added_where_they_are_one_tensor(tmp_path: Path) -> None:
    """An adapter of the time when experts were modules, of a base that was saved since."""
    base = build("qwen3_moe", tmp_path / "base", seed=0, dtype="float32")
    apart = one_by_one(build("qwen3_moe", tmp_path / "apart", seed=0, dtype="float32"))
    learned(base, tmp_path / "adapter", target_modules=["q_proj"])
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, tensor in load_file(apart / "model.safetensors").items():
        if ".experts.1." in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            out, width = tensor.shape
            held[f"{module}.lora_A.weight"] = torch.randn(3, width, generator=generator)
            held[f"{module}.lora_B.weight"] = torch.randn(out, 3, generator=generator)
    save_file(held, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    results = []
    for lying, folder in (("one by one", apart), ("in one", in_one(base)), ("transposed", tmp_path / "turned")):
        if lying == "transposed":
            in_one(build("qwen3_moe", folder, seed=0, dtype="float32"), transposed=True)
        polymerge.merge(
            {"merge_method": "copy", "models": [f"{folder}+{tmp_path / 'adapter'}"]},
            tmp_path / f"out {lying}",
            check=False,
        )
        results.append(raw(one_by_one(tmp_path / f"out {lying}")))
    assert results[0] == results[1] == results[2]
    assert results[0] != raw(apart)


# --- together with all else


def test_a_base_with_an_adapter_is_merged_and_is_the_same_in_memory(tmp_path: Path) -> None:
    base = build("qwen3_moe", tmp_path / "base", seed=0, dtype="float32")
    other = build("qwen3_moe", tmp_path / "other", seed=1, dtype="float32")
    adapter = on_experts(base, tmp_path / "adapter")
    recipe = {
        "merge_method": "linear",
        "models": [f"{base}+{adapter}", str(other)],
        "parameters": {"weight": 0.5},
        "dtype": "bfloat16",
    }
    wanted = merged_everywhere(recipe, tmp_path)
    mine, theirs = merged_by_peft(base, adapter), merged_by_peft(other, None)
    for name, tensor in wanted.items():
        mixed = (mine[name] + theirs[name]) / 2
        assert ((tensor.float() - mixed).abs() <= (mixed.abs() + 1e-6) * 2**-8 * 1.001).all(), name


def test_experts_in_fp8_take_an_adapter(tmp_path: Path) -> None:
    base = in_one(build("qwen3_vl_moe", tmp_path / "base", seed=0, dtype="float32"))
    adapter = on_experts(base, tmp_path / "adapter")
    numbers = quantized(base, "blocks of 24 x 20")
    recipe = {"merge_method": "copy", "models": [f"{base}+{adapter}"], "dtype": "float32"}
    polymerge.merge(recipe, tmp_path / "out", check=False)
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file(numbers, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found, wanted = loaded(tmp_path / "out").state_dict(), merged_by_peft(plain, adapter)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), **SAME_WEIGHTS)


# --- what is refused


def test_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    base = build("qwen3_moe", tmp_path / "base", seed=0, dtype="float32")
    adapter = on_experts(base, tmp_path / "adapter", r=3)
    file = adapter / "adapter_model.safetensors"
    held = load_file(file)
    for name in [name for name in held if ".experts." in name]:
        held[name] = torch.cat([held[name], held[name]], dim=0 if "lora_A" in name else 1)
    save_file(held, file, metadata={"format": "pt"})
    ran = cli("fold", adapter, "--base", base, "-o", tmp_path / "out")
    assert ran.status == 2
    assert "experts in one tensor, 4 of them" in ran.err


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    base = in_one(build("qwen3_moe", tmp_path / "base", seed=0, dtype="float32"))
    adapter = on_experts(base, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    held = load_file(file)
    for name in [name for name in held if ".experts.lora_A" in name]:
        held[name] = held[name][:, :20].contiguous()
    save_file(held, file, metadata={"format": "pt"})
    ran = cli("fold", adapter, "--base", base, "-o", tmp_path / "out")
    assert ran.status == 2
    assert "experts.down_proj of the adapter is for [32, 20] (1 more like it)" in ran.err


def test_the_expressions_have_a_form_in_json() -> None:
    of = Rows(Stacked(Read("w"), True), 4, 8)
    for expr in (Adapted(of, "a", "b", 0.5, False, (1, 4)), LowRank("a", "b", 0.5, None, 4, True)):
        assert expr_from_json(expr_to_json(expr)) == expr
    for wrong in ({"expert": [4, 4]}, {"expert": [0]}, {"expert": None}):
        with pytest.raises(polymerge.PolymergeError, match="not a read expression"):
            expr_from_json(expr_to_json(Adapted(of, "a", "b", 0.5)) | wrong)  # type: ignore[operator]
