"""Weights in fp8 are read as numbers while they are merged: the bits are those of a literal dequantization."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import polymerge
from expert_adapters import gemma4, qwen3_5
from fp8_made import CODES, FP8, KINDS, codes, literal, quantized
from polymerge.engine.device import Torch
from polymerge.engine.executor import execute
from polymerge.engine.opening import opened
from polymerge.errors import CheckpointError, PolymergeError
from polymerge.inference.live import LiveModel
from running import checkpoint, cli, fold, linear, merged, raw
from tiny import build, generate, open_model, perturbed, related_llm
from tiny_experts import apart, in_one, one_by_one

SHAPES = {
    "model.embed_tokens.weight": (11, 200),
    "model.layers.0.mlp.up_proj.weight": (300, 200),
    "model.layers.0.mlp.down_proj.weight": (200, 300),
    "model.layers.0.self_attn.q_proj.weight": (130, 200),
    "model.norm.weight": (200,),
    "lm_head.weight": (11, 200),
}
UP = "model.layers.0.mlp.up_proj.weight"


def model(folder: Path, seed: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    generator = torch.Generator().manual_seed(seed)
    return checkpoint(
        folder, {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    )


def written(recipe: dict[str, Any], out: Path, **options: Any) -> dict[str, Tensor]:
    polymerge.merge(recipe, out, check=False, **options)
    return load_file(out / "model.safetensors")


def numbers(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


# --- values


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_has_the_bits_of_a_literal_one(kind: str, dtype: str, tmp_path: Path) -> None:
    one, other = model(tmp_path / "one", 1), model(tmp_path / "other", 2)
    ours, theirs = quantized(one, kind, dtype=dtype), numbers(other)
    models = [{"model": str(one), "parameters": {"weight": 0.3}}, {"model": str(other), "parameters": {"weight": 0.7}}]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"normalize": False}}
    found = written(recipe, tmp_path / "out")
    assert set(found) == set(SHAPES)
    for name, tensor in found.items():
        wanted = ours[name].float() * torch.tensor(0.3) + theirs[name].float() * torch.tensor(0.7)
        assert torch.equal(tensor, wanted.to(torch.bfloat16)), name
    config = (tmp_path / "out" / "config.json").read_text(encoding="utf-8")
    assert json.loads(config) == {"model_type": "llama"}


@pytest.mark.parametrize("scale", [torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
def test_scales_are_read_in_their_own_dtype(scale: torch.dtype, tmp_path: Path) -> None:
    one = model(tmp_path / "one", 1)
    ours = quantized(one, "blocks of 128", scale=scale)
    found = written({"merge_method": "copy", "models": [str(one)], "dtype": "float32"}, tmp_path / "out")
    for name, tensor in found.items():
        assert torch.equal(tensor, ours[name]), name


@pytest.mark.parametrize("dtype", FP8)
def test_all_codes_are_numbers_but_those_of_nan_and_infinity(dtype: str, tmp_path: Path) -> None:
    one = model(tmp_path / "one", 1)
    held = numbers(one)
    known = torch.tensor(CODES[dtype], dtype=torch.uint8)
    drawn = known.repeat(300)[: 300 * 200].reshape(300, 200).view(FP8[dtype])
    held |= {UP: drawn, f"{UP}_scale": torch.tensor(1.0)}
    checkpoint(one, held)
    found = written({"merge_method": "copy", "models": [str(one)], "dtype": "float32"}, tmp_path / "out")[UP]
    assert torch.equal(found, drawn.float())
    largest = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}[dtype]  # what a quantizer cut off is among them
    assert (found.max().item(), found.min().item()) == (largest, -largest)
    assert torch.equal(found.signbit(), drawn.float().signbit())  # zeros have signs too


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_is_refused_with_the_name_of_the_tensor(code: int, tmp_path: Path) -> None:
    one, other = model(tmp_path / "one", 1), model(tmp_path / "other", 2)
    quantized(one, "fbgemm")
    held = numbers(one)
    held[UP].view(torch.uint8)[299, 7] = code
    save_file(held, one / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"text\.layers\.0\.mlp\.up_proj\.weight of 'one' holds NaN"):
        written(linear(one, other), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("dtype", "code"), [("F8_E4M3", 0x7F), ("F8_E5M2", 0x7C), ("F8_E5M2", 0xFF)])
def test_a_tensor_that_is_not_merged_has_to_have_numbers_too(dtype: str, code: int, tmp_path: Path) -> None:
    one, other = model(tmp_path / "one", 1), model(tmp_path / "other", 2)
    quantized(one, "fbgemm", dtype=dtype)
    held = numbers(one)
    held[UP].view(torch.uint8)[299, 7] = code
    save_file(held, one / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"of 'one' holds NaN or infinity .*\. Repair the checkpoint$"):
        written(linear(one, other, exclude=["text.layers.*"]), tmp_path / "out")
    assert written(linear(other, one, template=str(other), exclude=["text.layers.*"]), tmp_path / "out")


def test_a_checkpoint_whose_cache_alone_is_quantized_is_merged_without_its_scales(tmp_path: Path) -> None:
    one, other = model(tmp_path / "one", 1), model(tmp_path / "other", 2)
    wanted = written(linear(one, other), tmp_path / "wanted")
    scales = {f"model.layers.0.self_attn.{name}_proj.{name}_scale": torch.tensor([0.5]) for name in "kv"}
    checkpoint(one, numbers(one) | scales)
    said = {"quantization_config": {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}}
    (one / "config.json").write_text(json.dumps({"model_type": "llama"} | said), encoding="utf-8")
    (one / "hf_quant_config.json").write_text("{}", encoding="utf-8")
    found = written(linear(one, other), tmp_path / "out")
    assert set(found) == set(SHAPES)
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8")) == {"model_type": "llama"}
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


@pytest.mark.parametrize("role", ["template", "source", "base"])
def test_scales_may_lie_in_another_shard_than_their_weight(role: str, tmp_path: Path) -> None:
    folders = {name: model(tmp_path / name, seed) for seed, name in enumerate(("template", "source", "base"))}
    quantized(folders[role], "blocks of 128")
    recipe: dict[str, Any] = {
        "merge_method": "ties",
        "template": str(folders["template"]),
        "models": [str(folders["template"]), str(folders["source"])],
        "base_model": str(folders["base"]),
        "exclude": ["*.down_proj.weight"],
        "parameters": {"weight": 0.5, "density": 0.5},
    }
    wanted = written(recipe, tmp_path / "wanted")
    apart, whole = folders[role], numbers(folders[role])
    shards = [
        {name: tensor for name, tensor in whole.items() if ("scale" in name) == second} for second in (False, True)
    ]
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, apart / file)
    index = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    (apart / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    (apart / "model.safetensors").unlink()
    found = written(recipe, tmp_path / "out")
    assert all(torch.equal(found[name], wanted[name]) for name in SHAPES)
    (apart / files[1]).unlink()
    with pytest.raises(PolymergeError, match="model-00002-of-00002"):
        written(recipe, tmp_path / "again")


@pytest.mark.parametrize(("scale", "words"), [(float("nan"), "_scale holds NaN"), (3e38, "of 'one' holds NaN or inf")])
def test_scales_that_make_no_numbers_are_refused(scale: float, words: str, tmp_path: Path) -> None:
    one, other = model(tmp_path / "one", 1), model(tmp_path / "other", 2)
    quantized(one, "fbgemm")
    held = numbers(one)
    held[f"{UP}_scale"][12] = scale
    save_file(held, one / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        written(linear(one, other), tmp_path / "out")


def test_a_product_is_rounded_to_float32_also_among_wider_tensors(tmp_path: Path) -> None:
    one, other = model(tmp_path / "one", 1), model(tmp_path / "other", 2, torch.float64)
    ours = quantized(one, "blocks of 24 x 20")
    recipe = linear(other, one, template=str(other))
    for name, tensor in written(recipe, tmp_path / "out").items():
        assert torch.equal(tensor, ours[name].double() * 0.5 + numbers(other)[name] * 0.5), name


# --- every way of reading


METHODS: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "parameters": {"weight": 0.5}},
    "ties": {"merge_method": "ties", "parameters": {"weight": 0.5, "density": 0.4}},
    "dare_ties": {"merge_method": "dare_ties", "parameters": {"weight": 0.5, "density": 0.4}},
    "slerp": {"merge_method": "slerp", "parameters": {"t": 0.3}},
}


@pytest.mark.parametrize("method", METHODS)
def test_fp8_is_merged_like_the_same_numbers_in_float32(method: str, tmp_path: Path) -> None:
    one, other, base = (model(tmp_path / name, seed) for seed, name in enumerate(("one", "other", "base")))
    recipe = {**METHODS[method], "models": [str(one), str(other)], "dtype": "bfloat16"}
    recipe |= {"base_model": str(base)} if "t" not in METHODS[method]["parameters"] and method != "linear" else {}
    made = {folder: quantized(folder, "blocks of 24 x 20", seed=seed) for seed, folder in enumerate((one, base))}
    results = [written(recipe, tmp_path / f"out{n}", threads=n, block=block) for n, block in ((1, 1 << 19), (2, 999))]
    for folder, tensors in made.items():
        checkpoint(folder, tensors)
    results.append(written(recipe, tmp_path / "plain"))
    for found in results[:-1]:
        assert all(torch.equal(found[name], results[-1][name]) for name in SHAPES)


def test_a_device_gives_the_same_bits(tmp_path: Path) -> None:
    one, other = model(tmp_path / "one", 1), model(tmp_path / "other", 2)
    quantized(one, "blocks of 24 x 20", dtype="F8_E5M2", scale=torch.float8_e8m0fnu)
    quantized(other, "compressed-tensors, groups")
    plan = polymerge.plan(linear(one, other))
    entries = [opened(place).entries for place in plan.inputs]
    found: list[dict[tuple[str, int], bytes]] = [{}, {}]
    for held, device in zip(found, (None, Torch("cpu")), strict=True):

        def write(name: str, view: memoryview, start: int, held: dict[tuple[str, int], bytes] = held) -> None:
            held[name, start] = bytes(view)

        from polymerge.engine.device import Device

        execute(plan, entries, write, device=device or Device(), threads=1, block=7777)
    assert found[0] == found[1]


def test_what_is_not_merged_is_rounded_once(tmp_path: Path) -> None:
    one, other = model(tmp_path / "one", 1), model(tmp_path / "other", 2)
    ours = quantized(one, "static, a tensor")
    found = written(linear(one, other, exclude=["text.layers.*"]), tmp_path / "out")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert torch.equal(found[name], ours[name].to(torch.bfloat16))


# --- experts, in one tensor and one by one


@pytest.mark.parametrize("kind", ["blocks of 24 x 20", "fbgemm", "static, a tensor"])
@pytest.mark.parametrize("lying", ["one by one", "in one", "transposed"])
def test_experts_in_fp8(lying: str, kind: str, tmp_path: Path) -> None:
    one = build("qwen3_moe", tmp_path / "one", seed=0)
    other = perturbed(one, tmp_path / "other", seed=1)
    if lying == "one by one":
        one_by_one(one)
    else:
        in_one(one, transposed=lying == "transposed")
    ours = quantized(one, kind)
    found = written({"merge_method": "copy", "models": [str(one)], "dtype": "float32"}, tmp_path / "alone")
    for name, tensor in found.items():
        assert torch.equal(tensor, ours[name].float()), name
    first, second = apart(ours), apart(numbers(other))
    for number, pair in enumerate(([one, other], [other, one])):
        mixed = apart(written(linear(*pair, template=str(pair[0])), tmp_path / f"out{number}"))
        for name, tensor in mixed.items():
            wanted = (first[name].float() * 0.5 + second[name].float() * 0.5).to(torch.bfloat16)
            assert torch.equal(tensor, wanted), name


def test_rows_of_a_fused_tensor_in_fp8(tmp_path: Path) -> None:
    fused = build("phi3", tmp_path / "fused", seed=0)
    other = perturbed(fused, tmp_path / "other", seed=1)
    theirs, ours = numbers(other), quantized(fused, "blocks of 24 x 20")
    assert any("qkv_proj.weight_scale_inv" in name for name in numbers(fused))
    found = written(linear(fused, other, exclude=["*.q_proj.weight", "*.gate_proj.weight"]), tmp_path / "out")
    for name, tensor in found.items():
        mixed = ours[name].float() * 0.5 + theirs[name].float() * 0.5
        kept = {"qkv_proj": 32, "gate_up_proj": len(tensor) // 2}.get(name.split(".")[-2], 0)
        wanted = torch.cat([ours[name].float()[:kept], mixed[kept:]]).to(torch.bfloat16)
        assert torch.equal(tensor, wanted), name


# --- what transformers makes of it


def test_a_vlm_in_fp8_and_a_language_model_become_one_that_loads(tmp_path: Path) -> None:
    vlm = build("llava", tmp_path / "vlm", seed=0)
    llm = related_llm(vlm, tmp_path / "llm", seed=1)
    ours = quantized(vlm, "blocks of 24 x 20")
    (vlm / "hf_quant_config.json").write_text("{}", encoding="utf-8")
    out = merged(linear(vlm, llm, template=str(vlm)), tmp_path / "out")
    assert "quantization" not in (out / "config.json").read_text(encoding="utf-8")
    assert not (out / "hf_quant_config.json").exists()
    assert not any("scale" in name for name in raw(out))
    assert cli("verify", out).status == 0
    assert generate(out).isfinite().all()
    record = json.loads((out / "polymerge.json").read_text(encoding="utf-8"))
    assert record["output"]["tensors"]["merged"] > 0
    assert len(ours) == len(raw(out))


@pytest.mark.parametrize("template", ["in fp8", "plain"])
@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("make", [qwen3_5, gemma4])
def test_families_of_this_year_in_fp8(make: Any, experts: bool, template: str, tmp_path: Path) -> None:
    """No table has them, and their class is built from a config that says that it is quantized."""
    one = make(tmp_path / "one", experts=experts)
    other = perturbed(one, tmp_path / "other", seed=1)
    ours, theirs = quantized(one, "blocks of 24 x 20"), numbers(other)
    file = one / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"]["modules_to_not_convert"] = ["lm_head", "model.visual", "model.vision_tower"]
    file.write_text(json.dumps(config), encoding="utf-8")
    recipe = linear(one, other, template=str(one if template == "in fp8" else other))
    out = tmp_path / "out"
    polymerge.merge(recipe, out)  # which loads what it has written
    found = numbers(out)
    assert set(found) == set(theirs)
    for name, tensor in found.items():
        wanted = ours[name].float() * 0.5 + theirs[name].float() * 0.5
        computed = template == "in fp8" and not torch.equal(ours[name], numbers(one)[name].to(ours[name].dtype))
        assert tensor.dtype == (torch.bfloat16 if computed else theirs[name].dtype)
        assert torch.equal(tensor, wanted.to(tensor.dtype)), name
    assert "quantization" not in (out / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("excluded", [[], ["text.layers.1.*"]])
def test_a_merge_in_memory_has_the_bits_of_that_on_disk(family: str, excluded: list[str], tmp_path: Path) -> None:
    one = build(family, tmp_path / "one", seed=0)
    other = perturbed(one, tmp_path / "other", seed=1)
    quantized(one, "blocks of 24 x 20")
    recipe = linear(one, other, exclude=excluded)
    out = merged(recipe, tmp_path / "out")
    plan = polymerge.plan(recipe)
    live = LiveModel(plan)
    for _ in range(2):
        live.set(plan)
        found, wanted = live.model.state_dict(), open_model(out).state_dict()
        assert set(found) == set(wanted)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        live.set(polymerge.plan(linear(one, other, exclude=excluded, parameters={"weight": 0.25})))
    live.close()


@pytest.mark.filterwarnings("ignore:.*")
def test_an_adapter_is_folded_into_a_base_in_fp8(tmp_path: Path) -> None:
    from folded import learned

    base = build("llama", tmp_path / "base", seed=0, dtype="float32")
    learned(base, tmp_path / "adapter")
    ours = quantized(base, "blocks of 24 x 20")
    out = numbers(fold(base, tmp_path / "adapter", tmp_path / "out"))
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    changed = 0
    for name, tensor in out.items():
        factor = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
        wanted = ours[name].double()
        if factor.format("A") in held:
            update = held[factor.format("B")].double() @ held[factor.format("A")].double()
            wanted = wanted + config["lora_alpha"] / config["r"] * update
            changed += 1
        near = wanted.to(torch.bfloat16) if tensor.dtype == torch.bfloat16 else wanted.float()
        assert (tensor.double() - near.double()).abs().max() <= 2**-8 * wanted.abs().max(), name
    assert changed == 6


def test_the_deltas_of_a_template_in_fp8_are_from_its_numbers(tmp_path: Path) -> None:
    one = build("llama", tmp_path / "one", seed=0, dtype="float32")
    other = perturbed(one, tmp_path / "other", seed=1)
    third = perturbed(one, tmp_path / "third", seed=2)
    ours = quantized(one, "blocks of 24 x 20")
    recipe = linear(other, third, template=str(one))
    overlap = polymerge.overlap(recipe).rows()
    checkpoint(one, ours, json.loads((other / "config.json").read_text(encoding="utf-8")))
    assert overlap == polymerge.overlap(recipe).rows()


def test_codes_have_all_that_there_are() -> None:
    drawn = codes((20, 20), "F8_E4M3", torch.Generator())
    assert set(drawn.view(torch.uint8).unique().tolist()) == set(CODES["F8_E4M3"])
    whole = literal(torch.ones(2, 3, 4).to(torch.float8_e4m3fn), torch.arange(4.0).reshape(2, 2, 1), (2, 0))
    assert whole[:, :, 0].tolist() == [[0.0, 0.0, 1.0], [2.0, 2.0, 3.0]]
