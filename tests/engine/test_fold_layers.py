"""LoRA of layers that are not `torch.nn.Linear`, folded: convolutions, GPT-2's `Conv1D`, tables of positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import polymerge
from adapters_made import PEFT_WARNINGS
from expert_adapters import merged_by_peft, qwen3_5
from folded import SAME_WEIGHTS, check, learned, merged_everywhere, trained
from fp8_made import quantized
from paths import GOLDEN
from polymerge.analysis.robustness import robustness
from polymerge.errors import Refused
from running import cli, fold, raw
from tiny import build, loaded

pytestmark = PEFT_WARNINGS

OF_CONV1D = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")

PATCHES = {
    "llava": "patch_embedding",  # Conv2d
    "qwen2_vl": r".*patch_embed\.proj",  # Conv3d
    "qwen3_vl_moe": r".*patch_embed\.proj",
}


# --- convolutions


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True, "rank_pattern": {"patch_embed.*": 5}, "alpha_pattern": {"patch_embed.*": 2}}],
    ids=["plain", "patterns"],
)
@pytest.mark.parametrize("family", PATCHES)
def test_embeddings_of_patches(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    base = build(family, tmp_path / "base", seed=0, dtype="float32")
    targets = PATCHES[family]
    case = trained(base, tmp_path / "adapter", target_modules=targets if "*" in targets else [targets], **settings)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.ndim for tensor in factors.values()} == {4 if family == "llava" else 5}
    assert len(check(case, fold(base, tmp_path / "adapter", tmp_path / "out"))) == 1


class Convolutions(torch.nn.Module):
    """A convolution of each number of dimensions, one of them with kernels of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Conv1d(6, 4, 3, bias=False)
        self.two = torch.nn.Conv2d(3, 5, (2, 4))
        self.point = torch.nn.Conv2d(4, 4, 1)
        self.three = torch.nn.Conv3d(2, 7, (1, 2, 3))


@pytest.mark.parametrize("block", [1 << 19, 7])
def test_convolutions_of_any_dimensions(block: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Convolutions()
    base = tmp_path / "base"
    base.mkdir()
    save_file(model.state_dict(), base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps({"model_type": "no_such_model"}), encoding="utf-8")
    peft = get_peft_model(model, LoraConfig(r=3, lora_alpha=4, target_modules=["one", "two", "point", "three"]))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape))
    peft.save_pretrained(tmp_path / "adapter")
    recipe = {"merge_method": "copy", "models": [f"{base}+{tmp_path / 'adapter'}"]}
    polymerge.merge(recipe, tmp_path / "out", check=False, block=block, threads=2)
    wanted: dict[str, Tensor] = peft.merge_and_unload().state_dict()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, **SAME_WEIGHTS)


def test_a_merge_with_a_convolution_s_adapter_is_the_same_in_memory(tmp_path: Path) -> None:
    base, other = (build("qwen2_vl", tmp_path / name, seed=seed) for seed, name in enumerate(("base", "other")))
    learned(base, tmp_path / "adapter", target_modules=r".*(patch_embed\.proj|q_proj)")
    recipe = {
        "merge_method": "linear",
        "parts": ["text", "vision", "projector"],
        "models": [f"{base}+{tmp_path / 'adapter'}", str(other)],
        "parameters": {"weight": 0.5},
    }
    merged_everywhere(recipe, tmp_path)


def test_adapters_of_convolutions_are_not_merged_by_themselves(tmp_path: Path) -> None:
    base = build("llava", tmp_path / "base", seed=0, dtype="float32")
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        learned(base, folder, seed=seed, target_modules=["patch_embedding", "q_proj"])
    recipe = {"merge_method": "linear", "models": [str(one) for one in folders], "parameters": {"weight": 0.5}}
    with pytest.raises(Refused) as refused:
        polymerge.plan(recipe)
    assert [str(problem).partition(": ")[2] for problem in refused.value.problems] == [
        "'model.vision_tower.embeddings.patch_embedding': factors of a convolution, which are not merged by "
        "themselves. Write BASE+ADAPTER to merge full models"
    ] * 2
    polymerge.plan(recipe | {"models": [f"{base}+{one}" for one in folders]})
    (compared,) = robustness(str(folders[0]), [str(folders[1])])
    assert any("patch_embedding" in name for name in compared.modules)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_a_convolution_in_groups_is_refused_as_peft_refuses_it(tmp_path: Path) -> None:
    base = qwen3_5(tmp_path / "base", experts=False)
    learned(base, tmp_path / "adapter", r=64, target_modules=["conv1d"])
    with pytest.raises(NotImplementedError, match="groups"):
        PeftModel.from_pretrained(loaded(base), tmp_path / "adapter").merge_and_unload()
    ran = cli("fold", tmp_path / "adapter", "--base", base, "-o", tmp_path / "out")
    assert ran.status == 1
    assert "lora_A [64, 64, 4], lora_B [64, 1, 1]: factors of a convolution in groups, which PEFT" in ran.err


def test_a_kernel_of_another_size_is_refused(tmp_path: Path) -> None:
    base = build("llava", tmp_path / "base", seed=0, dtype="float32")
    learned(base, tmp_path / "adapter", target_modules=["patch_embedding"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    held = load_file(file)
    (name,) = [name for name in held if "lora_A" in name]
    rank, channels, height, width = held[name].shape
    save_file(held | {name: torch.zeros(rank, channels, height, width + 1)}, file, metadata={"format": "pt"})
    ran = cli("fold", tmp_path / "adapter", "--base", base, "-o", tmp_path / "out")
    assert ran.status == 2
    assert f"patch_embedding of the adapter is for [16, {channels}, {height}, {width + 1}]" in ran.err


# --- GPT-2's layers


def gpt2(folder: Path) -> Path:
    """A GPT-2 with a head of its own, the only layer that is a `torch.nn.Linear`."""
    shape = {"vocab_size": 13, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 8, "tie_word_embeddings": False}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=1, eos_token_id=2))
        model.float().save_pretrained(folder)
    return folder


GPT2: dict[str, dict[str, Any]] = {
    "all": {"target_modules": ["c_attn", "c_proj", "c_fc"]},
    "said so": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "with the head": {"target_modules": ["c_attn", "c_proj", "c_fc", "lm_head"]},
    "a square one with the head": {"target_modules": ["attn.c_proj", "lm_head"]},
    "the head alone": {"target_modules": ["lm_head"]},
    "tables": {"target_modules": ["wte", "wpe", "c_attn"]},
    "biases": {"target_modules": ["c_attn", "c_proj"], "lora_bias": True},
}


@OF_CONV1D
@pytest.mark.parametrize("settings", GPT2.values(), ids=GPT2)
def test_layers_that_store_in_by_out(settings: dict[str, Any], tmp_path: Path) -> None:
    """PEFT's config says of all of them what is true of the last one."""
    base = gpt2(tmp_path / "base")
    learned(base, tmp_path / "adapter", **settings)
    out = fold(base, tmp_path / "adapter", tmp_path / "out")
    wanted, before = merged_by_peft(base, tmp_path / "adapter"), merged_by_peft(base, None)
    found = loaded(out).state_dict()
    assert any(not torch.equal(before[name], tensor) for name, tensor in wanted.items())
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, **SAME_WEIGHTS)


@OF_CONV1D
def test_gpt2_s_adapters_are_merged_whatever_their_configs_say_of_the_last_layer(tmp_path: Path) -> None:
    base = gpt2(tmp_path / "base")
    for name, targets in (("one", ["c_attn"]), ("two", ["c_attn", "lm_head"])):
        learned(base, tmp_path / name, target_modules=targets)
    said = [
        json.loads((tmp_path / name / "adapter_config.json").read_text(encoding="utf-8"))["fan_in_fan_out"]
        for name in ("one", "two")
    ]
    assert said == [True, False]
    models = [str(tmp_path / name) for name in ("one", "two")]
    recipe = {"merge_method": "cat", "models": models, "base_model": str(base), "parameters": {"weight": 0.5}}
    polymerge.merge(recipe, tmp_path / "out")
    mixed, one, two, before = (merged_by_peft(base, folder) for folder in (tmp_path / "out", *map(Path, models), None))
    for name, tensor in before.items():
        if "c_attn.weight" in name:
            wanted = tensor + (one[name] - tensor) / 2 + (two[name] - tensor) / 2
            torch.testing.assert_close(mixed[name], wanted, rtol=1e-5, atol=1e-5)


def test_a_square_layer_of_a_model_without_such_layers_is_as_the_config_says(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", seed=0, dtype="float32")
    learned(base, tmp_path / "adapter", target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_config.json"
    out = fold(base, tmp_path / "adapter", tmp_path / "out")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fan_in_fan_out": True}), encoding="utf-8")
    assert raw(fold(base, tmp_path / "adapter", tmp_path / "other")) != raw(out)


# --- as other versions of PEFT wrote them


@pytest.mark.parametrize("version", ["0.18.1", "0.19.1"])
@pytest.mark.parametrize("case", ["qwen3_moe", "qwen3_moe_ranks", "gpt_oss", "gpt2"])
def test_adapters_that_earlier_versions_saved(case: str, version: str, tmp_path: Path) -> None:
    kept = GOLDEN / "peft" / version / case
    assert json.loads((kept / "adapter" / "adapter_config.json").read_text())["peft_version"] == version
    found = loaded(fold(kept / "base", kept / "adapter", tmp_path / "out")).state_dict()
    wanted, before = load_file(kept / "merged.safetensors"), loaded(kept / "base").state_dict()
    assert set(found) == set(wanted)
    assert sum(not torch.equal(wanted[name], before[name]) for name in wanted) == (2 if case == "gpt2" else 3)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, **SAME_WEIGHTS)


def test_shapes_tell_the_layout_whatever_version_the_config_names(tmp_path: Path) -> None:
    kept = GOLDEN / "peft" / "0.18.1" / "qwen3_moe"
    config = json.loads((kept / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes((kept / "adapter" / "adapter_model.safetensors").read_bytes())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_version": "0.19.1"}), encoding="utf-8")
    out = raw(fold(kept / "base", kept / "adapter", tmp_path / "out"))
    assert out == raw(fold(kept / "base", folder, tmp_path / "again"))


def test_a_convolution_of_a_base_in_fp8_stays_plain_and_takes_its_adapter(tmp_path: Path) -> None:
    base = build("llava", tmp_path / "base", seed=0, dtype="float32")
    learned(base, tmp_path / "adapter", target_modules=["patch_embedding", "q_proj"])
    numbers = quantized(base, "blocks of 24 x 20")
    out = load_file(fold(base, tmp_path / "adapter", tmp_path / "out") / "model.safetensors")
    (name,) = [name for name in out if name.endswith("patch_embedding.weight")]
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (next(factors[key] for key in factors if f"patch_embedding.lora_{end}" in key) for end in "AB")
    update = torch.einsum("or,rihw->oihw", b[:, :, 0, 0].double(), a.double()) * 5 / 3
    torch.testing.assert_close(out[name].double(), numbers[name].double() + update, rtol=1e-6, atol=1e-6)
