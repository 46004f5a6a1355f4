"""Adapters of parameters that hold all experts are merged with each other, and PEFT loads what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import polymerge
from adapters_made import PEFT_WARNINGS, config
from expert_adapters import PARAMETERS, as_before_019, merged_by_peft, on_experts, qwen3_5
from polymerge.analysis.robustness import robustness
from running import cli, recipe_file
from tiny import build, loaded

pytestmark = PEFT_WARNINGS

ENOUGH = 12
"""A rank that loses nothing of what is merged here."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base and two adapters of it, of different ranks."""
    root = tmp_path_factory.mktemp("experts")
    base = build("qwen3_moe", root / "base", seed=0, dtype="float32")
    one = on_experts(base, root / "one", seed=1)
    other = on_experts(base, root / "other", seed=2, r=2, rank_pattern={"experts.down_proj": 4})
    return base, one, other


def merged(made: tuple[Path, ...], out: Path, method: str = "linear", **parameters: Any) -> Path:
    base, *adapters = made
    given = {"weight": 0.5, "rank": ENOUGH} | parameters
    models = [{"model": str(adapter)} for adapter in adapters]
    recipe = {"merge_method": method, "models": models, "base_model": str(base), "parameters": given}
    ran = cli("merge", recipe_file(recipe, out.with_suffix(".yaml")), "-o", out)
    assert ran.status == 0, ran.err
    return out


def check_mean(made: tuple[Path, ...], out: Path) -> None:
    """Hold a merged adapter against the mean of what PEFT makes of its sources."""
    base, *adapters = made
    before, found = merged_by_peft(base, None), merged_by_peft(base, out)
    sources = [merged_by_peft(base, adapter) for adapter in adapters]
    for name, tensor in before.items():
        wanted = tensor + sum((source[name] - tensor) / len(sources) for source in sources)
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
@pytest.mark.parametrize("more", [{}, {"space": "delta"}, {"space": "knots"}])
def test_the_mean_of_two(made: tuple[Path, Path, Path], method: str, more: dict[str, Any], tmp_path: Path) -> None:
    out = merged(made, tmp_path / "out", method, **more)
    check_mean(made, out)
    held = load_file(out / "adapter_model.safetensors")
    shapes = {name.partition("layers.0.mlp.")[2]: tuple(tensor.shape) for name, tensor in held.items()}
    assert shapes["experts.base_layer.lora_B.weight"][0] == 48  # that of gate_up_proj, which PEFT wraps first
    assert shapes["experts.lora_B.weight"][0] == 32
    assert sorted(config(out)["target_parameters"]) == sorted(PARAMETERS)  # PEFT writes a set
    assert "every tensor has its module" in cli("verify", out).out


@pytest.mark.parametrize("method", ["ties", "dare_ties", "tsv", "svd"])
def test_each_expert_is_merged_by_itself(made: tuple[Path, Path, Path], method: str, tmp_path: Path) -> None:
    """As the matrices of its experts would be as modules of their own."""
    known = {"ties": {"density": 0.5}, "dare_ties": {"density": 1.0}}.get(method, {})
    given: dict[str, Any] = {"rank": ENOUGH, "weight": 0.5} | known
    base, *adapters = made
    experts, results = 2, []
    for number in range(experts):
        apart = [alone(adapter, number, experts, tmp_path / f"{adapter.name}{number}") for adapter in adapters]
        recipe = {"merge_method": method, "models": list(map(str, apart)), "parameters": given}
        polymerge.merge(recipe, tmp_path / f"out{number}", check=False)
        results.append(load_file(tmp_path / f"out{number}" / "adapter_model.safetensors"))
    recipe = {"merge_method": method, "models": list(map(str, adapters)), "parameters": given}
    polymerge.merge(recipe, tmp_path / "out", check=False)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    wraps = [name for name in found if ".experts." in name and name.endswith("lora_A.weight")]
    assert len(wraps) == 4
    for name in wraps:
        a, b = found[name], found[name.replace("lora_A", "lora_B")]
        for number, own in enumerate(results):
            kind = "first" if ".base_layer." in name else "second"
            module = f"{name.partition('.experts.')[0]}.{kind}"
            rank = len(a) // experts
            update = b.reshape(len(b), -1, experts)[:, :, number] @ a.reshape(experts, rank, -1)[number]
            wanted = own[f"{module}.lora_B.weight"] @ own[f"{module}.lora_A.weight"]
            torch.testing.assert_close(update, wanted, rtol=1e-5, atol=1e-6)
    assert base.exists()


def alone(adapter: Path, expert: int, experts: int, folder: Path) -> Path:
    """The factors of one expert as those of two modules."""
    folder.mkdir()
    held = load_file(adapter / "adapter_model.safetensors")
    found, ranks = {}, {}
    for name, tensor in held.items():
        if ".experts." in name:
            kind = "first" if ".base_layer." in name else "second"
            module = f"{name.partition('.experts.')[0]}.{kind}"
            if "lora_A" in name:
                own = tensor.reshape(experts, -1, tensor.shape[1])[expert]
                ranks[kind] = len(own)
            else:
                own = tensor.reshape(len(tensor), -1, experts)[:, :, expert]
            found[f"{module}.{name[-13:]}"] = own.contiguous()
    said = config(adapter)
    said |= {"target_parameters": None, "target_modules": ["first", "second"], "rank_pattern": ranks}
    save_file(found, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    return folder


def test_the_layouts_of_two_versions_meet(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, one, other = made
    old = as_before_019(other, tmp_path / "old")
    results = [merged((base, one, second), tmp_path / f"out{number}") for number, second in enumerate((other, old))]
    first, second = (load_file(out / "adapter_model.safetensors") for out in results)
    assert first.keys() == second.keys()
    check_mean(made, results[1])
    turned = merged((base, old, one), tmp_path / "turned")
    check_mean(made, turned)
    assert config(turned)["peft_version"] == "0.19.0"
    both = [as_before_019(adapter, tmp_path / f"old {adapter.name}") for adapter in (one, other)]
    check_mean(made, merged((base, *both), tmp_path / "of old ones"))  # which the base tells


def test_what_nothing_tells_is_as_it_was(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Without a base, and without an adapter of today, factors of before stay as they lie, and the plan says so."""
    base, *adapters = made
    both = [as_before_019(adapter, tmp_path / adapter.name) for adapter in adapters]
    for adapter in both:
        said = config(adapter) | {"base_model_name_or_path": None}
        (adapter / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    recipe = {"merge_method": "linear", "models": list(map(str, both)), "parameters": {"weight": 0.5, "rank": ENOUGH}}
    plan = polymerge.plan(recipe)
    assert any("which later ones cannot load. Say base_model" in warning for warning in plan.warnings)
    polymerge.merge(plan, tmp_path / "out")
    assert config(tmp_path / "out")["peft_version"] == "0.18.1"
    polymerge.merge({"merge_method": "copy", "models": [f"{base}+{tmp_path / 'out'}"]}, tmp_path / "folded")
    wanted = merged_by_peft(base, merged(made, tmp_path / "today"))
    found = loaded(tmp_path / "folded").state_dict()
    assert all(torch.allclose(found[name], wanted[name], rtol=0, atol=2e-6) for name in wanted)


def test_a_copy_is_turned_too(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, one, other = made
    old = as_before_019(other, tmp_path / "old")
    models = [{"model": str(old), "parameters": {"weight": 1}}, {"model": str(one), "parameters": {"weight": 1}}]
    recipe = {"merge_method": "task_arithmetic", "models": models, "base_model": str(base), "exclude": ["*experts*"]}
    polymerge.merge(recipe, tmp_path / "out")
    found, wanted = merged_by_peft(base, tmp_path / "out"), merged_by_peft(base, other)
    names = [name for name in wanted if "experts" in name]
    assert all(torch.allclose(found[name], wanted[name], rtol=0, atol=2e-6) for name in names)


@pytest.mark.parametrize("first", [0, 1])
def test_an_adapter_that_lacks_a_parameter(made: tuple[Path, Path, Path], first: int, tmp_path: Path) -> None:
    base, one, _ = made
    inner = on_experts(base, tmp_path / "inner", seed=3, target_parameters=["experts.gate_up_proj"])
    pair = [inner, one] if first == 0 else [one, inner]
    out = merged((base, *pair), tmp_path / "out", normalize=False)
    check_mean((base, *pair), out)
    names = [name for name in load_file(out / "adapter_model.safetensors") if "layers.0.mlp.experts." in name]
    assert sum(".base_layer." in name for name in names) == len(names) // 2


def test_the_largest_rank_of_all_is_kept_without_a_word(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    plan = polymerge.plan({"merge_method": "ties", "models": list(map(str, made[1:])), "parameters": {"weight": 0.5}})
    ranks = {step.name.rpartition(".")[2]: step.lora.rank for step in plan.steps if step.lora and step.lora.experts}
    assert ranks == {"gate_up_proj": 3, "down_proj": 4}
    again = polymerge.plan(plan.to_json())
    assert again.hash == plan.hash
    assert again.steps == plan.steps
    for number, told in enumerate((plan, again)):
        polymerge.merge(told, tmp_path / f"out{number}", threads=number + 1)
    one, other = (load_file(tmp_path / f"out{number}" / "adapter_model.safetensors") for number in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_module_of_a_family_that_is_not_known(tmp_path: Path) -> None:
    base = qwen3_5(tmp_path / "base", experts=True)
    modules = ["q_proj", "in_proj_qkv", "out_proj"]
    adapters = [on_experts(base, tmp_path / f"{seed}", seed=seed, target_modules=modules) for seed in (1, 2)]
    check_mean((base, *adapters), merged((base, *adapters), tmp_path / "out"))


def test_measurements_are_of_each_expert(made: tuple[Path, Path, Path]) -> None:
    base, one, other = made
    (found,) = robustness(str(one), [str(one)])
    assert "model.layers.0.mlp.experts.down_proj[1]" in found.modules
    assert found.largest is not None
    assert abs(found.largest.cosine - 1) < 1e-9
    recipe = {"merge_method": "linear", "models": [str(one), str(other)], "parameters": {"weight": 0.5}}
    (row,) = [row for row in polymerge.overlap(recipe).rows() if (row["layer"], row["module"]) == (0, "mlp")]
    before, after = merged_by_peft(base, None), merged_by_peft(base, one)
    moved = [(after[name] - before[name]).double().norm() ** 2 for name in before if "layers.0.mlp.experts" in name]
    assert abs(row["norm one"] - float(sum(moved)) ** 0.5) < 1e-5
