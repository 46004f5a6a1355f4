"""A LoRA of experts that are one tensor in memory: what PEFT loads, and what folding it gives back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, GptOssConfig, Llama4TextConfig, Qwen3MoeConfig

import polymerge as pm
from adapters_made import PEFT_WARNINGS, PREFIX, config, record, tensors
from expert_adapters import merged_by_peft, on_experts
from folded import SAME_LOGITS, SAME_WEIGHTS
from fp8_made import quantized
from killed_merge import killed
from polymerge.engine import differences, finished
from polymerge.errors import PolymergeError
from running import cli, fold, raw
from tiny import build, loaded, logits, perturbed
from tiny_derived import filled
from tiny_experts import in_one, one_by_one

pytestmark = PEFT_WARNINGS

LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "": lambda folder: folder,
    "one by one": one_by_one,
    "in one": in_one,
    "transposed": lambda folder: in_one(folder, transposed=True),
}
LYING = [
    ("qwen3_moe", "one by one", "in one"),
    ("mixtral", "", ""),
    ("qwen3_vl_moe", "in one", "transposed"),
    ("qwen3_vl_moe", "transposed", "in one"),
]
PARAMETERS = "gate_up_proj", "down_proj"
TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip
CLASSES: dict[str, Callable[[], Any]] = {
    # gate_up_proj is square, and only down_proj tells how both lie
    "square": lambda: Qwen3MoeConfig(**TEXT, num_experts=3, moe_intermediate_size=16, head_dim=8),
    # a first layer without experts, whose modules have names that PEFT takes for those of experts
    "dense first": lambda: Qwen3MoeConfig(
        **TEXT, num_experts=3, moe_intermediate_size=24, head_dim=8, mlp_only_layers=[0]
    ),
    "shared": lambda: DeepseekV3Config(
        **TEXT | {"num_key_value_heads": 4}, n_routed_experts=4, n_group=1, topk_group=1, moe_intermediate_size=24,
        first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    ),
    # [experts, in, out], which the class says
    "transposed": lambda: GptOssConfig(**TEXT, num_local_experts=3, head_dim=8, layer_types=["full_attention"] * 2),
    # [experts, in, out], which it does not say
    "silent": lambda: Llama4TextConfig(
        **TEXT | {"num_experts_per_tok": 1}, num_local_experts=3, head_dim=8, intermediate_size_mlp=48,
        interleave_moe_layer_step=1,
    ),
}  # fmt: skip


def made(settings: Any, folder: Path) -> Path:
    model = AutoModelForCausalLM.from_config(settings).float()
    filled(model, 0)
    model.save_pretrained(folder)
    return folder


def says(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(1, 20)[None]).logits


def matrices(folder: Path) -> dict[str, Tensor]:
    """The matrices of every parameter of experts in memory, float64."""
    return {name: tensor.double() for name, tensor in loaded(folder).state_dict().items() if ".experts." in name}


# --- what comes out


@pytest.mark.parametrize(("family", "lying", "tuned_lying"), LYING)
def test_at_full_rank_the_fine_tune_comes_back(family: str, lying: str, tuned_lying: str, tmp_path: Path) -> None:
    base = build(family, tmp_path / "base", dtype="float32")
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    LAYOUTS[lying](base)
    LAYOUTS[tuned_lying](tuned)
    found = pm.extract(tuned, tmp_path / "adapter", base=base, rank=99)
    assert found.verification is not None
    assert next(one for one in found.verification.findings if one.check == "loads").passed
    assert sum(name.endswith(PARAMETERS) for name in found.modules) == 4
    assert found.error < 1e-6
    said = config(tmp_path / "adapter")
    assert said["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj", "gate.weight"]
    wanted, before = loaded(tuned).state_dict(), loaded(base).state_dict()
    merged, out = merged_by_peft(base, tmp_path / "adapter"), fold(base, tmp_path / "adapter", tmp_path / "out")
    folded = loaded(out).state_dict()
    held = [name for name in wanted if ".experts." in name or ".mlp.gate." in name]
    assert len(held) == 6
    for name in held:
        assert not torch.equal(wanted[name], before[name])
        torch.testing.assert_close(merged[name], wanted[name], **SAME_WEIGHTS)
        torch.testing.assert_close(folded[name], wanted[name], **SAME_WEIGHTS)
    with_adapter = PeftModel.from_pretrained(loaded(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(with_adapter, base), logits(loaded(out), out), **SAME_LOGITS)


@pytest.mark.parametrize("kind", CLASSES)
def test_classes_of_other_kinds(kind: str, tmp_path: Path) -> None:
    base = made(CLASSES[kind](), tmp_path / "base")
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    found = pm.extract(tuned, tmp_path / "adapter", base=base, rank=99)
    assert found.error < 1e-6
    plain = AutoModelForCausalLM.from_pretrained
    before, wanted = plain(base).state_dict(), plain(tuned).state_dict()
    model = PeftModel.from_pretrained(plain(base), tmp_path / "adapter")
    out = fold(base, tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(says(model), says(plain(out)), **SAME_LOGITS)
    merged, folded = model.merge_and_unload().state_dict(), plain(out).state_dict()
    matrix = [name for name, tensor in before.items() if tensor.dim() > 1 and "embed" not in name]
    matrix = [name for name in matrix if "lm_head" not in name and "_bias" not in name]
    assert sum(name.endswith(PARAMETERS) for name in matrix) == (2 if kind in ("dense first", "shared") else 4)
    for name in matrix:
        torch.testing.assert_close(merged[name], wanted[name], **SAME_WEIGHTS)
        torch.testing.assert_close(folded[name], wanted[name], **SAME_WEIGHTS)


def test_what_a_rank_leaves_out_is_what_the_svd_of_each_expert_says(tmp_path: Path) -> None:
    base = build("qwen3_moe", tmp_path / "base", dtype="bfloat16")
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    found = pm.extract(tuned, tmp_path / "adapter", base=base, rank=5)
    before, after = matrices(base), matrices(tuned)
    merged = {name: tensor.double() for name, tensor in merged_by_peft(base, tmp_path / "adapter").items()}
    for name, one in before.items():
        s = torch.linalg.svdvals(after[name] - one)
        held = found.modules[name]
        assert (held.rank, held.experts) == (5, len(one))
        assert held.norm == pytest.approx(float(s.norm()), rel=1e-6)
        assert held.error == pytest.approx(float(s[:, 5:].norm() / s.norm()), rel=1e-5)
        left = float((merged[name] - after[name]).norm())
        assert left == pytest.approx(held.error * held.norm, rel=1e-2)  # PEFT adds in bfloat16
    said = record(tmp_path / "adapter")["output"]["modules"]
    assert said == {name: one.to_json() for name, one in found.modules.items()}
    assert said[next(iter(before))]["experts"] == 2
    assert "experts" not in said["model.layers.0.self_attn.q_proj"]
    assert config(tmp_path / "adapter")["peft_version"] == "0.19.0"


def test_the_experts_of_a_parameter_share_the_rank_of_their_energy(tmp_path: Path) -> None:
    base = in_one(build("qwen3_moe", tmp_path / "base", dtype="float32"))
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    held = load_file(tuned / "model.safetensors")
    first = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    # of rank one, and of all ranks alike, but small
    steps = torch.stack([torch.outer(torch.arange(48.0), torch.ones(32)), torch.randn(48, 32)])
    held[name] = first[name] + steps * 1e-2
    save_file(held, tuned / "model.safetensors", metadata={"format": "pt"})
    found = pm.extract(tuned, tmp_path / "adapter", base=base, energy=0.8, max_rank=9)
    before, after = matrices(base), matrices(tuned)
    for key, one in before.items():
        s = torch.linalg.svdvals(after[key] - one).square().sum(dim=0)
        shares = torch.cumsum(s, 0) / s.sum()
        rank = min(9, 1 + int((shares < 0.8).sum()))
        assert found.modules[key].rank == rank
        assert found.modules[key].error == pytest.approx(abs(float(1 - shares[rank - 1])) ** 0.5, rel=1e-4, abs=1e-5)
    assert found.modules[name].rank == 1  # the large one decides
    assert {found.modules[key].rank for key in before} > {1}
    merged = merged_by_peft(base, tmp_path / "adapter")
    for key, one in found.modules.items():
        if one.experts:
            left = (merged[key] - after[key]).norm() / (after[key] - before[key]).norm()
            assert float(left) == pytest.approx(one.error, rel=1e-4, abs=1e-5)


def test_only_what_differs_is_named(tmp_path: Path) -> None:
    """Of the second layer one expert of one parameter: what lies innermost elsewhere is alone there."""
    base = in_one(build("qwen3_moe", tmp_path / "base", dtype="float32"))
    tuned = perturbed(base, tmp_path / "tuned", seed=3, size=0.0)
    held = load_file(tuned / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    changed = {f"model.layers.0.mlp.experts.{name}" for name in PARAMETERS} | {"model.layers.1.mlp.experts.down_proj"}
    for name in changed:
        held[name][1] += torch.randn(held[name][1].shape, generator=generator)
    save_file(held, tuned / "model.safetensors", metadata={"format": "pt"})
    found = pm.extract(tuned, tmp_path / "adapter", base=base, rank=99)
    assert found.modules.keys() == changed
    assert config(tmp_path / "adapter")["target_modules"] == []
    assert config(tmp_path / "adapter")["target_parameters"] == sorted(changed)
    names = {name.removeprefix(PREFIX) for name in tensors(tmp_path / "adapter") if name.endswith("A.weight")}
    assert names == {
        f"model.layers.{place}.lora_A.weight"
        for place in ("0.mlp.experts", "0.mlp.experts.base_layer", "1.mlp.experts")
    }
    merged, wanted = merged_by_peft(base, tmp_path / "adapter"), loaded(tuned).state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(merged[name], tensor, **SAME_WEIGHTS)
    folded = loaded(fold(base, tmp_path / "adapter", tmp_path / "out")).state_dict()
    torch.testing.assert_close(dict(folded), dict(wanted), **SAME_WEIGHTS)


@pytest.mark.parametrize(("dtype", "lying"), [("bfloat16", ""), ("float64", "in one")])
def test_experts_in_another_dtype_and_by_a_glob(dtype: str, lying: str, tmp_path: Path) -> None:
    base = LAYOUTS[lying](build("qwen3_moe", tmp_path / "base", dtype="float32"))
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    how: dict[str, Any] = {"base": base, "rank": 99, "dtype": dtype, "match": ("text.layers.*.experts.down_proj.*",)}
    found = pm.extract(tuned, tmp_path / "adapter", **how)
    assert list(found.modules) == [f"model.layers.{layer}.mlp.experts.down_proj" for layer in range(2)]
    assert {str(one.dtype) for one in tensors(tmp_path / "adapter").values()} == {f"torch.{dtype}"}
    assert all((one.error > 1e-4) == (dtype == "bfloat16") for one in found.modules.values())
    before, after = matrices(base), matrices(tuned)
    merged = merged_by_peft(base, tmp_path / "adapter")
    for name, one in found.modules.items():
        left = (merged[name] - after[name]).norm() / (after[name] - before[name]).norm()
        assert float(left) == pytest.approx(one.error, rel=1e-2, abs=1e-6)
    other = "text.layers.0.mlp.experts.gate_proj.weight+text.layers.0.mlp.experts.up_proj.weight"
    assert found.left_out[other].why == "not asked for"
    whole = torch.cat(
        [(after[name] - before[name]).flatten() for name in before if ".0." in name and "gate_up" in name]
    )
    assert found.left_out[other].norm == pytest.approx(float(whole.norm()), rel=1e-5)


def test_the_same_bits_whatever_the_threads(tmp_path: Path) -> None:
    base = build("qwen3_moe", tmp_path / "base")
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    for threads in (1, 4):
        pm.extract(tuned, tmp_path / f"{threads}", base=base, energy=0.7, threads=threads, check=False)
    assert raw(tmp_path / "1") == raw(tmp_path / "4")


def test_a_fine_tune_in_fp8_and_one_with_an_adapter(tmp_path: Path) -> None:
    base = in_one(build("qwen3_vl_moe", tmp_path / "base", dtype="float32"))
    adapter = on_experts(base, tmp_path / "trained", r=2)
    found = pm.extract(f"{base}+{adapter}", tmp_path / "again", base=base, rank=2)
    assert found.error < 1e-5
    assert sum(one.experts > 0 for one in found.modules.values()) == 4
    wanted, merged = merged_by_peft(base, adapter), merged_by_peft(base, tmp_path / "again")
    for name, tensor in wanted.items():
        torch.testing.assert_close(merged[name], tensor, **SAME_WEIGHTS)
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    numbers = quantized(tuned, "blocks of 24 x 20")
    pm.extract(tuned, tmp_path / "of fp8", base=base, rank=99)
    merged = merged_by_peft(base, tmp_path / "of fp8")
    for name in [name for name in numbers if ".experts." in name]:
        torch.testing.assert_close(merged[name], numbers[name].float(), **SAME_WEIGHTS)


def test_what_lies_beside_experts_cannot_be_kept_in_full(tmp_path: Path) -> None:
    base = made(CLASSES["transposed"](), tmp_path / "base")
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    found = pm.extract(tuned, tmp_path / "adapter", base=base, rank=2, save=("*bias*", "*experts.down_proj.weight"))
    assert {name.rpartition("layers.")[2] for name in found.saved} == {
        f"{layer}.self_attn.{name}_proj.bias" for layer in range(2) for name in "qkvo"
    }
    why = {one.why for name, one in found.left_out.items() if "_proj_bias" in name or "router" in name}
    assert why == {"lies beside a parameter that has factors of its own, and PEFT saves whole modules only"}
    assert found.verification is not None
    assert found.verification.passed


def test_extracted_adapters_are_merged(tmp_path: Path) -> None:
    """Of a router and of layers that PEFT knows by their weights, whose ranks the output's config has to tell."""
    base = made(CLASSES["dense first"](), tmp_path / "base")
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    adapters, sums = [tmp_path / "one", tmp_path / "other"], {name: tensor.clone() for name, tensor in before.items()}
    for seed, (out, options) in enumerate(zip(adapters, [{}, {"exclude": ("*.q_proj.*",)}], strict=True), 3):
        tuned = perturbed(base, tmp_path / f"tuned {seed}", seed=seed)
        pm.extract(tuned, out, base=base, energy=0.9, check=False, **options)
        after = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).merge_and_unload()
        for name, tensor in after.state_dict().items():
            sums[name] += (tensor - before[name]) / 2
    models = [{"model": str(one), "parameters": {"weight": 0.5}} for one in adapters]
    recipe = {"merge_method": "task_arithmetic", "models": models, "base_model": str(base), "parameters": {"rank": 64}}
    assert pm.merge(recipe, tmp_path / "merged").verification.passed
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "merged")
    for name, tensor in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(tensor, sums[name], rtol=0, atol=2e-6, msg=name)


# --- going on, refusing, telling


@pytest.mark.parametrize("options", [{"rank": 4}, {"energy": 0.8}])
@pytest.mark.parametrize(("calls", "threads"), [(1, 1), (7, 1), (5, 3)])
def test_an_extraction_that_was_killed_goes_on_in_the_middle_of_a_parameter(
    calls: int, threads: int, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build("qwen3_moe", tmp_path / "base")
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    called, largest = list[int](), differences.largest
    monkeypatch.setattr(differences, "largest", lambda *said: called.append(1) or largest(*said))
    monkeypatch.setattr(finished, "YOUNG", 0)
    asked: dict[str, Any] = {"tuned": str(tuned), "base": str(base), **options, "match": ["*.experts.*"]}
    calm = pm.extract(**asked, out=tmp_path / "calm", check=False)
    assert (len(called), calm.resumed) == (8, 0)  # two experts of two parameters of two layers
    work = killed(asked, tmp_path / "adapter", calls, threads)
    called.clear()
    found = pm.extract(**asked, out=tmp_path / "adapter", check=False)
    assert raw(tmp_path / "adapter") == raw(tmp_path / "calm")
    assert (found.modules, found.left_out) == (calm.modules, calm.left_out)
    assert found.resumed == 8 - len(called)
    assert found.resumed == calls - 1 if threads == 1 else found.resumed <= calls - 1
    assert not work.exists()


def test_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    base = in_one(build("qwen3_moe", tmp_path / "base", dtype="float32"))
    tuned = in_one(build("qwen3_moe", tmp_path / "tuned", seed=1, dtype="float32"))
    held = load_file(tuned / "model.safetensors")
    for name in held:
        if ".experts." in name or ".mlp.gate." in name:
            held[name] = torch.cat([held[name], held[name]])
    save_file(held, tuned / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(said | {"num_experts": 4, "num_local_experts": 4}))
    with pytest.raises(PolymergeError) as error:
        pm.extract(tuned, tmp_path / "adapter", base=base, rank=2)
    assert "'tuned' is [4, 48, 32], base 'base' is [2, 48, 32]" in str(error.value)
    assert not (tmp_path / "adapter").exists()


def test_what_the_command_says_of_experts(tmp_path: Path) -> None:
    base = build("qwen3_moe", tmp_path / "base")
    tuned = perturbed(base, tmp_path / "tuned", seed=3)
    ran = cli("extract", tuned, "--base", base, "--rank", 4, "-o", tmp_path / "adapter")
    assert ran.status == 0, ran.err
    assert "model.layers.{i}.mlp.experts.gate_up_proj" in ran.out
    assert "18 matrices" in ran.err
    assert "all experts of a layer are one parameter in memory" in ran.err
    assert "PEFT 0.19" in ran.err
