"""Quantized checkpoints are recognised, by config or by tensors, and refused with the reason and a way out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import polymerge
from headers_only import checkpoint, decoder, llm, vlm
from polymerge.families.quantization import packed_tensor, quantization_method, without_quantization
from running import cli, merged, recipe_file
from tiny import build, load, perturbed

Shapes = dict[str, tuple[str, tuple[int, ...]]]

Q = "model.layers.0.self_attn.q_proj"
GPTQ: Shapes = {
    f"{Q}.qweight": ("I32", (1, 8)),
    f"{Q}.qzeros": ("I32", (1, 1)),
    f"{Q}.scales": ("F16", (1, 8)),
    f"{Q}.g_idx": ("I32", (8,)),
}
AWQ: Shapes = {
    f"{Q}.qweight": ("I32", (8, 1)),
    f"{Q}.qzeros": ("I32", (1, 1)),
    f"{Q}.scales": ("F16", (1, 8)),
}
NF4: Shapes = {
    f"{Q}.weight": ("U8", (32, 1)),
    f"{Q}.weight.absmax": ("U8", (1,)),
    f"{Q}.weight.nested_absmax": ("F32", (1,)),
    f"{Q}.weight.nested_quant_map": ("F32", (256,)),
    f"{Q}.weight.quant_map": ("F32", (16,)),
    f"{Q}.weight.quant_state.bitsandbytes__nf4": ("U8", (90,)),
}
INT8: Shapes = {f"{Q}.weight": ("I8", (8, 8)), f"{Q}.SCB": ("F32", (8,)), f"{Q}.weight_format": ("U8", ())}
PACKED: Shapes = {
    f"{Q}.weight_packed": ("I32", (8, 1)),
    f"{Q}.weight_scale": ("BF16", (8, 1)),
    f"{Q}.weight_shape": ("I64", (2,)),
}
EETQ: Shapes = {f"{Q}.weight": ("I8", (8, 8)), f"{Q}.weight_scales": ("F16", (8,))}
HQQ: Shapes = {
    f"{Q}.W_q": ("U8", (4, 8)),
    f"{Q}.scale": ("F16", (1, 8)),
    f"{Q}.zero": ("F16", (1, 8)),
    f"{Q}.nbits": ("I64", ()),
}
QUANTO: Shapes = {
    f"{Q}.weight._data": ("I8", (8, 8)),
    f"{Q}.weight._scale": ("BF16", (8, 1)),
    f"{Q}.input_scale": ("BF16", ()),
    f"{Q}.output_scale": ("BF16", ()),
}
MXFP4: Shapes = {
    "model.layers.0.mlp.experts.down_proj_blocks": ("U8", (2, 8, 1, 16)),
    "model.layers.0.mlp.experts.down_proj_scales": ("U8", (2, 8, 1)),
}
NVFP4: Shapes = {
    f"{Q}.weight": ("U8", (8, 4)),
    f"{Q}.weight_scale": ("F8_E4M3", (8, 1)),
    f"{Q}.weight_scale_2": ("F32", ()),
    f"{Q}.input_scale": ("F32", ()),
}
MLX: Shapes = {f"{Q}.weight": ("U32", (8, 1)), f"{Q}.scales": ("BF16", (8, 1)), f"{Q}.biases": ("BF16", (8, 1))}
TORCHAO: Shapes = {f"{Q}._weight_qdata": ("F8_E4M3", (8, 8)), f"{Q}._weight_scale": ("F32", (8, 1))}
TORCHAO_BEFORE: Shapes = {f"{Q}.weight:qdata": ("F8_E4M3", (8, 8)), f"{Q}.weight:scale": ("F32", (8, 1))}
MXFP4_BYTES: Shapes = {f"{Q}.weight": ("I8", (8, 4)), f"{Q}.scale": ("F8_E8M0", (8, 1))}
NVFP4_PACKED: Shapes = {
    f"{Q}.weight_packed": ("U8", (8, 4)),
    f"{Q}.weight_scale": ("F8_E4M3", (8, 1)),
    f"{Q}.weight_global_scale": ("F32", (1,)),
}
FNUZ: Shapes = {f"{Q}.weight": ("F8_E4M3FNUZ", (8, 8)), f"{Q}.weight_scale": ("F32", ())}

GROUPS = {
    "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 128, "symmetric": True}}
}

FORMATS: dict[str, tuple[dict[str, Any], str, Shapes, str]] = {
    "gptq": (
        {"bits": 4, "group_size": 128, "desc_act": True, "sym": True, "true_sequential": True, "quant_method": "gptq"},
        "gptq",
        GPTQ,
        "gptq",
    ),
    "awq": (
        {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm", "quant_method": "awq"},
        "awq",
        AWQ,
        "awq or gptq",
    ),
    "bitsandbytes, 4 bit": (
        {"_load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "load_in_4bit": True, "quant_method": "bitsandbytes"},
        "bitsandbytes",
        NF4,
        "bitsandbytes",
    ),
    "bitsandbytes, 8 bit": (
        {"load_in_8bit": True, "llm_int8_threshold": 6.0, "quant_method": "bitsandbytes"},
        "bitsandbytes",
        INT8,
        "bitsandbytes",
    ),
    "bitsandbytes as first written": (
        {"load_in_8bit": True, "load_in_4bit": False},
        "bitsandbytes",
        INT8,
        "bitsandbytes",
    ),
    "compressed-tensors": (
        {
            "config_groups": GROUPS,
            "format": "pack-quantized",
            "ignore": ["lm_head"],
            "quant_method": "compressed-tensors",
        },
        "compressed-tensors",
        PACKED,
        "compressed-tensors",
    ),
    "eetq": ({"weights": "int8", "modules_to_not_convert": None, "quant_method": "eetq"}, "eetq", EETQ, "eetq"),
    "hqq": (
        {"quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}, "quant_method": "hqq"},
        "hqq",
        HQQ,
        "hqq",
    ),
    "quanto": ({"weights": "int8", "activations": None, "quant_method": "quanto"}, "quanto", QUANTO, "quanto"),
    "torchao": ({"quant_type": {"default": {}}, "quant_method": "torchao"}, "torchao", TORCHAO, "torchao"),
    "mxfp4": ({"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"}, "mxfp4", MXFP4, "mxfp4"),
    "nvfp4": ({"quant_algo": "NVFP4", "quant_method": "modelopt"}, "modelopt", NVFP4, "nvfp4"),
    "torchao before": ({"quant_method": "torchao"}, "torchao", TORCHAO_BEFORE, "torchao"),
    "mxfp4 in bytes": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", MXFP4_BYTES, "mxfp4"),
    "nvfp4, compressed-tensors": (
        {"format": "nvfp4-pack-quantized", "quant_method": "compressed-tensors"},
        "compressed-tensors",
        NVFP4_PACKED,
        "compressed-tensors",
    ),
    "fp8 of AMD": ({"quant_method": "fp8"}, "fp8", FNUZ, "fp8 fnuz"),
}
"""By format: its quantization_config, what is said of that, its tensors, and what is said of these alone."""

BESIDE = {
    "template": {"template": "packed", "models": ["plain", "packed"]},
    "model": {"template": "plain", "models": ["plain", "packed"]},
    "base": {"merge_method": "ties", "base_model": "packed", "models": ["plain", "tuned"]},
}


def quantized(folder: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], config: Mapping[str, Any]) -> Path:
    """A Llama with one packed module, in which all else is as it was."""
    said = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2}
    plain = {f"model.{name}": entry for name, entry in decoder(2, 8, 12, 4, 16, "BF16").items()}
    return checkpoint(folder, said | dict(config), {**plain, "lm_head.weight": ("BF16", (16, 8)), **tensors})


def refusal(tmp_path: Path, role: str = "model") -> str:
    """What `plan` says where `packed` plays a role beside `plain` and `tuned`."""
    asked: dict[str, Any] = {"merge_method": "linear", "parameters": {"weight": 0.5}, **BESIDE[role]}
    for name in ("plain", "tuned"):
        llm(tmp_path / name)
    asked["models"] = [{"model": str(tmp_path / name)} for name in asked["models"]]
    asked |= {key: str(tmp_path / asked[key]) for key in ("template", "base_model") if key in asked}
    file = recipe_file(asked, tmp_path / "recipe.yaml")
    ran, merged = cli("plan", file), cli("merge", file, "-o", tmp_path / "out")
    assert (ran.status, merged.status) == (2, 2)
    assert ran.err == merged.err
    assert not (tmp_path / "out").exists()
    assert "1 problem, nothing was written" in ran.err
    return ran.err


@pytest.mark.parametrize("role", BESIDE)
@pytest.mark.parametrize("kind", FORMATS)
def test_a_quantized_checkpoint_is_refused_in_every_role_by_its_config(kind: str, role: str, tmp_path: Path) -> None:
    settings, method, tensors, _ = FORMATS[kind]
    packed = quantized(tmp_path / "packed", tensors, {"quantization_config": settings})
    shown = packed_tensor({name: dtype for name, (dtype, _) in tensors.items()})
    assert shown is not None
    said = refusal(tmp_path, role)
    assert f"'packed' ({packed}) is quantized ({method}; {shown[1]} is {tensors[shown[1]][0]}): its numbers" in said
    assert "Use the unquantized checkpoint" in said


@pytest.mark.parametrize("kind", FORMATS)
def test_it_is_refused_by_its_tensors_where_the_config_says_nothing(kind: str, tmp_path: Path) -> None:
    *_, tensors, method = FORMATS[kind]
    quantized(tmp_path / "packed", tensors, {})
    assert f"is quantized ({method}; " in refusal(tmp_path)


def test_mlx_has_a_key_of_its_own(tmp_path: Path) -> None:
    quantized(tmp_path / "packed", MLX, {"quantization": {"group_size": 64, "bits": 4}})
    assert f"is quantized (mlx; {Q}.weight is U32)" in refusal(tmp_path)
    assert packed_tensor({name: dtype for name, (dtype, _) in MLX.items()}) == ("mlx", f"{Q}.weight")
    assert quantization_method({"quantization": {"codebooks": 2}}) is None


@pytest.mark.parametrize(
    ("settings", "way"),
    [
        ({"quant_method": "bitsandbytes"}, "after model.dequantize()"),
        ({"quant_method": "fp8"}, "FineGrainedFP8Config(dequantize=True)"),
        ({"quant_method": "mxfp4"}, "Mxfp4Config(dequantize=True)"),
        ({"quant_method": "compressed-tensors"}, "CompressedTensorsConfig(dequantize=True)"),
        ({"quant_method": "gptq"}, None),
    ],
)
def test_the_way_out_is_said(settings: dict[str, Any], way: str | None, tmp_path: Path) -> None:
    quantized(tmp_path / "packed", {f"{Q}.weight": ("U8", (8, 8))}, {"quantization_config": settings})
    said = refusal(tmp_path)
    assert (", or what transformers saves" in said) == (way is not None)
    assert way is None or way in said


@pytest.mark.parametrize("kind", ["FineGrainedFP8Config", "Mxfp4Config", "CompressedTensorsConfig"])
def test_transformers_has_the_ways_out(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    assert "dequantize" in (getattr(transformers, kind).__init__).__annotations__
    assert callable(transformers.PreTrainedModel.dequantize)


@pytest.mark.parametrize("inside", ["text_config", "vision_config"])
def test_a_part_that_is_quantized_alone_is_enough(inside: str, tmp_path: Path) -> None:
    method = {"quantization_config": {"quant_method": "awq"}}
    numbers = {"multi_modal_projector.linear_1.bias": ("U8", (8,))}
    vlm(tmp_path / "packed", config={inside: {"model_type": "llama", **method}}, more=numbers)
    assert "is quantized (awq)" in refusal(tmp_path)
    assert quantization_method({"thinker_config": {inside: method}}) == "awq"


@pytest.mark.parametrize("alone", [True, False], ids=["the file", "its folder"])
def test_gguf_files_are_refused_with_the_way_out(alone: bool, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    file = tmp_path / "packed" / "model-Q4_K_M.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00")
    llm(tmp_path / "plain")
    models = [{"model": str(tmp_path / "plain")}, {"model": str(file if alone else file.parent)}]
    asked = {"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}}
    ran = cli("plan", recipe_file(asked, tmp_path / "recipe.yaml"))
    assert ran.status == 2
    assert f"({file}) is quantized (gguf): its numbers cannot be merged" in ran.err
    assert "from_pretrained(FOLDER, gguf_file=FILE)" in ran.err


def test_a_gguf_file_beside_weights_does_not_matter(tmp_path: Path) -> None:
    one, other = llm(tmp_path / "one"), llm(tmp_path / "other")
    (other / "model.gguf").write_bytes(b"GGUF")
    asked = {"merge_method": "linear", "models": [str(one), str(other)], "parameters": {"weight": 0.5}}
    ran = cli("plan", recipe_file(asked, tmp_path / "recipe.yaml"))
    assert ran.status == 0, ran.err


def test_scales_of_plain_weights_and_other_types_alone_are_not_quantization() -> None:
    assert packed_tensor({"logit_scale": "F32", "norm.weight": "BF16", "norm.weight_scale": "F32"}) is None
    assert packed_tensor({"table.scales": "F16", "table.indices": "I64", "w.weight": "F8_E4M3"}) is None
    assert packed_tensor({}) is None


# --- plain weights under a config that still says that they are quantized


@pytest.mark.parametrize("kind", ["llama", "llava"])
@pytest.mark.parametrize("template", [True, False], ids=["template", "model"])
def test_a_config_that_is_out_of_date_is_not_believed(kind: str, template: bool, tmp_path: Path) -> None:
    plain = build(kind, tmp_path / "plain", dtype="float32")
    stale = perturbed(plain, tmp_path / "stale", seed=1)
    config = json.loads((stale / "config.json").read_text(encoding="utf-8"))
    said = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    inside = {key: {**value, **said} for key, value in config.items() if key == "text_config"}
    (stale / "config.json").write_text(json.dumps(config | inside | said), encoding="utf-8")
    models = [(stale, 0.7), (plain, 0.3)] if template else [(plain, 0.3), (stale, 0.7)]
    entries = [{"model": str(model), "parameters": {"weight": weight}} for model, weight in models]
    asked = {"merge_method": "linear", "models": entries}
    out = merged(asked, tmp_path / "out")  # which loads: `merge` checks that
    written = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in json.dumps(written)
    assert written == (config if template else json.loads((plain / "config.json").read_text(encoding="utf-8")))
    one, other = load(stale), load(plain)
    for name, tensor in load(out).items():
        assert torch.allclose(tensor, 0.7 * one[name] + 0.3 * other[name], rtol=0, atol=1e-6), name
    warnings = polymerge.plan(asked).warnings
    note = "its config.json says that it is quantized (bitsandbytes), and its weights are plain"
    assert any(warning.startswith(f"'stale': {note}") for warning in warnings)
    assert ("the output's config.json lacks that setting: its weights are plain" in warnings) == template


@pytest.mark.parametrize(
    ("companion", "dtype"), [("weight_scale", "F32"), ("weight_scale_inv", "F32"), ("zeros", "I32"), ("table", "U8")]
)
def test_a_config_is_believed_where_a_tensor_bears_it_out(companion: str, dtype: str, tmp_path: Path) -> None:
    quantized(tmp_path / "packed", {f"{Q}.{companion}": (dtype, (8, 1))}, {"quantization_config": {"bits": 8}})
    assert "is quantized (unknown): its numbers cannot be merged" in refusal(tmp_path)


def test_what_a_config_says_of_quantization_is_taken_out_wherever_it_is() -> None:
    method = {"quantization_config": {"quant_method": "awq"}}
    config = {"a": 1, "text_config": {"b": [2], **method}, "compression_config": {"c": 3}, **method}
    assert without_quantization(config) == {"a": 1, "text_config": {"b": [2]}}
    assert without_quantization({"quantization": {"bits": 4}}) == {}
    assert without_quantization({"quantization": {"codebooks": 2}}) == {"quantization": {"codebooks": 2}}
