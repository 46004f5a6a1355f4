"""What recipes of mergekit's mean: where t begins, what the base weighs, whose files the output has, what is noted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import polymerge
from headers_only import llm, vlm
from polymerge.errors import Refused
from polymerge.planning import Plan
from running import checkpoint, cli, recipe_file, small_llama, tensor

NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {}
    for seed, name in enumerate(("base", "a", "b")):
        tensors = {key: value.float() for key, value in small_llama(seed).items()}
        if name == "a":
            tensors[NORM] = torch.zeros_like(tensors[NORM])
        made[name] = checkpoint(root / name, tensors, {"model_type": "llama", "made_for": name})
        (made[name] / "tokenizer.json").write_text("{}", encoding="utf-8")
    return made


def recipe_of(
    folders: dict[str, Path], method: str, models: Any, base: str | None = None, **more: Any
) -> dict[str, Any]:
    """A recipe over models by their names, each with its weight, or without one."""
    entries = [
        {"model": str(folders[name])} | ({} if weight is None else {"parameters": {"weight": weight}})
        for name, weight in (models.items() if isinstance(models, dict) else ((name, None) for name in models))
    ]
    said = {"merge_method": method, "models": entries, **more}
    return said | ({"base_model": str(folders[base])} if base else {})


def plan_of(recipe: dict[str, Any]) -> Plan:
    made = polymerge.plan(recipe)
    assert isinstance(made, Plan)
    return made


def values(recipe: dict[str, Any], out: Path, name: str = UP) -> Tensor:
    polymerge.merge(recipe, out, check=False)
    return tensor(out, name)


def held(folders: dict[str, Path], name: str, key: str = UP) -> Tensor:
    return tensor(folders[name], key)


def arc(first: Tensor, second: Tensor, t: float) -> Tensor:
    """Slerp as it is written down."""
    cosine = float((first * second).sum() / (first.norm() * second.norm())) if first.norm() * second.norm() > 0 else 0.0
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


# --- slerp


@pytest.mark.parametrize(
    ("models", "base"), [("ab", "b"), ("ba", "b"), ("a", "b"), ("ab", "a"), ("b", "a"), ("ab", None), ("ba", None)]
)
def test_t_is_counted_from_the_base_wherever_it_stands(
    folders: dict[str, Path], tmp_path: Path, models: str, base: str | None
) -> None:
    recipe = recipe_of(folders, "slerp", models, base, parameters={"t": 0.2})
    start = base or models[0]
    end = "a" if start == "b" else "b"
    for name in (UP, NORM):
        expected = arc(held(folders, start, name), held(folders, end, name), 0.2)
        torch.testing.assert_close(values(recipe, tmp_path / name, name), expected, rtol=1e-5, atol=1e-6)
    plan = plan_of(recipe)
    assert plan.beside["config"] == plan.beside["tokenizer"] == start
    assert [plan.inputs[place].label for place in plan.models] == list(dict.fromkeys(models + (base or "")))
    turned = f"t is counted from base_model '{base}'; the plan has it from '{end}'"
    assert plan.warnings == ((turned,) if (models + (base or ""))[1] == base else ())
    assert plan.settings[0].parameters["t"] == (0.8 if plan.warnings else 0.2)


@pytest.mark.parametrize("base", ["a", "b", None])
def test_weights_of_slerp_are_each_model_s_own_say(folders: dict[str, Path], tmp_path: Path, base: str | None) -> None:
    recipe = recipe_of(folders, "slerp", {"a": 3, "b": 1}, base)
    expected = arc(held(folders, "a"), held(folders, "b"), 0.25)
    torch.testing.assert_close(values(recipe, tmp_path / "out"), expected, rtol=1e-5, atol=1e-6)


def test_slerp_takes_a_base_in_no_more_than_two(folders: dict[str, Path]) -> None:
    plan = plan_of(recipe_of(folders, "slerp", "ab", "base", parameters={"t": 0.2}))  # which mergekit refuses
    assert (len(plan.models), plan.settings[0].parameters) == (2, {"t": 0.2})
    assert "base_model 'base' is not read: slerp needs none" in plan.warnings
    with pytest.raises(Refused, match="slerp takes 2 models, the recipe has 3"):
        plan_of(recipe_of(folders, "slerp", ("a", "b", "base"), "base", parameters={"t": 0.2}))


# --- the base among the models


def test_the_weight_of_the_base_is_in_no_sum(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of(
        folders, "task_arithmetic", {"base": 0.9, "a": 0.5, "b": 0.3}, "base", parameters={"normalize": True}
    )
    base, a, b = (held(folders, name) for name in ("base", "a", "b"))
    expected = base + (0.5 * (a - base) + 0.3 * (b - base)) / 0.8
    torch.testing.assert_close(values(recipe, tmp_path / "out"), expected, rtol=1e-5, atol=1e-6)
    plan = plan_of(recipe)
    assert [plan.inputs[place].label for place in plan.models] == ["a", "b"]
    said = "'base' is base_model, so its delta is zero and its own parameters have no effect"
    assert said in plan.warnings
    other_name = plan_of(recipe | {"base_model": str(folders["base"] / ".." / "base")})
    assert any(said.removeprefix("'base'") in one for one in other_name.warnings)
    assert plan_of(recipe_of(folders, "task_arithmetic", {"base": None, "a": 0.5, "b": 0.3}, "base")).warnings == ()


@pytest.mark.parametrize("main", ["linear", "task_arithmetic"])
def test_so_it_is_in_an_override_and_an_average_has_it_as_a_model(
    folders: dict[str, Path], tmp_path: Path, main: str
) -> None:
    other = "task_arithmetic" if main == "linear" else "linear"
    override = {"layers": 0, "merge_method": other, "parameters": {"normalize": True}}
    said = {"parameters": {"normalize": True}, "overrides": [override]}
    recipe = recipe_of(folders, main, {"base": 0.9, "a": 0.5, "b": 0.3}, "base", **said)
    out = tmp_path / "out"
    polymerge.merge(recipe, out, check=False)
    layers = {"linear": 0, "task_arithmetic": 1} if main == "task_arithmetic" else {"linear": 1, "task_arithmetic": 0}
    for method, layer in layers.items():
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        base, a, b = (held(folders, model, name) for model in ("base", "a", "b"))
        expected = {
            "linear": (0.9 * base + 0.5 * a + 0.3 * b) / 1.7,
            "task_arithmetic": base + (0.5 * (a - base) + 0.3 * (b - base)) / 0.8,
        }[method]
        torch.testing.assert_close(tensor(out, name), expected, rtol=1e-5, atol=1e-6)


def test_one_value_per_model_in_an_override_counts_the_base_where_it_is_listed(folders: dict[str, Path]) -> None:
    override = {"layers": 0, "parameters": {"weight": [7, 0.1, 0.2]}}
    plan = plan_of(recipe_of(folders, "ties", {"base": None, "a": 0.5, "b": 0.3}, "base", overrides=[override]))
    assert [setting.parameters["weight"] for setting in plan.settings] == [(0.1, 0.2), (0.5, 0.3)]


# --- whose config, tokenizer and chat template


def chat(folder: Path, how: str) -> None:
    """Give a model a chat template, in one of the places where it may lie."""
    if how == "chat_template.jinja":
        (folder / how).write_text("{{ messages }}", encoding="utf-8")
    else:
        (folder / how).write_text(json.dumps({"chat_template": "{{ messages }}"}), encoding="utf-8")


def test_the_output_of_a_delta_method_has_the_base_s_files(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of(folders, "ties", {"a": 0.5, "b": 0.3}, "base")
    plan = plan_of(recipe)
    assert plan.beside == {
        "config": "base", "tokenizer": "base", "chat_template": None,
        "why": "base_model, as the recipe names no template",
    }  # fmt: skip
    assert plan.to_json()["beside"] == plan.beside
    assert polymerge.plan(plan.to_json()) == plan
    out = polymerge.merge(recipe, tmp_path / "out", check=False).folder
    assert json.loads((out / "config.json").read_text())["made_for"] == "base"
    line = "  output: config, tokenizer of base (base_model, as the recipe names no template); no chat template"
    assert line in cli("plan", recipe_file(recipe, tmp_path / "r.yaml")).out.splitlines()


def test_who_else_gives_them(tmp_path: Path, folders: dict[str, Path]) -> None:
    text, eyes, tuned = llm(tmp_path / "text"), vlm(tmp_path / "eyes"), vlm(tmp_path / "tuned")
    every = {**folders, "text": text, "eyes": eyes, "tuned": tuned}

    def whose(*said: Any, **more: Any) -> tuple[str | None, str | None]:
        plan = plan_of(recipe_of(every, *said, **more))
        assert plan.inputs[plan.template].label == plan.beside["config"]
        return plan.beside["config"], plan.beside["why"]

    named = ", as the recipe names no template"
    both = {"text": 0.5, "eyes": 0.5}
    assert whose("ties", both, "text") == ("eyes", f"first multimodal model{named}")
    assert whose("linear", both, "text") == ("eyes", f"first multimodal model{named}")
    assert whose("ties", {"tuned": 0.5}, "eyes") == ("eyes", f"base_model{named}")
    assert whose("ties", {"tuned": 0.5}, "eyes", template=str(tuned)) == ("tuned", "template")
    assert whose("linear", {"a": 0.5, "b": 0.5}) == ("a", f"first model{named}")
    assert whose("linear", {"a": 0.5, "b": 0.5}, "b") == ("b", f"base_model{named}")
    assert whose("linear", {"a": 0.5, "b": 0.5}, "base") == ("a", f"first model{named}")


def test_a_bare_file_gives_no_config_where_a_model_has_one(tmp_path: Path, folders: dict[str, Path]) -> None:
    bare = {name: tmp_path / f"{name}.safetensors" for name in folders}
    for name, folder in folders.items():
        bare[name].write_bytes((folder / "model.safetensors").read_bytes())
    whole = checkpoint(tmp_path / "whole", small_llama(1, torch.float32), {"model_type": "nobody_knows_it"})
    plan = plan_of(recipe_of({**bare, "a": whole}, "ties", {"a": 0.5}, "base"))
    assert plan.beside["config"] == "whole"
    plan = plan_of(recipe_of(bare, "ties", {"a": 0.5}, "base"))
    assert (plan.inputs[plan.template].label, plan.beside["config"]) == ("base.safetensors", None)


@pytest.mark.parametrize("how", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_a_base_that_would_silence_chat_models_is_warned_of(tmp_path: Path, how: str) -> None:
    made = {name: llm(tmp_path / name) for name in ("base", "one", "other")}
    recipe = recipe_of(made, "ties", {"one": 0.5, "other": 0.3}, "base")
    assert plan_of(recipe).warnings == ()
    chat(made["other"], how)
    assert plan_of(recipe).warnings == (
        "'base' has no chat template, so the output will have none; there is one in 'other'. Say `template: "
        f"{made['other']}` for the config, tokenizer and chat template of that",
    )
    assert cli("merge", recipe_file(recipe, tmp_path / "r.yaml"), "-o", tmp_path / "out", "--no-verify").err.startswith(
        "note: 'base' has no chat template"
    )
    named = plan_of(recipe | {"template": str(made["other"])})
    assert (named.beside["chat_template"], named.warnings) == ("other", ())
    chat(made["base"], how)
    assert (plan_of(recipe).beside["chat_template"], plan_of(recipe).warnings) == ("base", ())


def test_the_chat_template_of_a_language_model_is_not_missed_in_a_vlm(tmp_path: Path) -> None:
    made = {"text": llm(tmp_path / "text"), "eyes": vlm(tmp_path / "eyes")}
    chat(made["text"], "chat_template.jinja")
    assert plan_of(recipe_of(made, "linear", {"eyes": 0.5, "text": 0.5})).warnings == ()


def test_a_tokenizer_config_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    made = {name: llm(tmp_path / name) for name in ("one", "other")}
    (made["one"] / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(Refused, match=r"tokenizer_config.json: is not JSON"):
        plan_of(recipe_of(made, "linear", {"one": 0.5, "other": 0.5}))


# --- what the plan notes


def test_dare_is_said_to_draw_other_entries(folders: dict[str, Path]) -> None:
    said = "dare_ties drops entries at random: reproducible for a seed, but not the ones that mergekit drops"
    thinned = {"parameters": {"density": 0.5}}
    assert said in plan_of(recipe_of(folders, "dare_ties", {"a": 0.5}, "base", **thinned)).warnings
    assert plan_of(recipe_of(folders, "dare_ties", {"a": 0.5}, "base")).warnings == ()


@pytest.mark.parametrize(
    ("method", "parameters", "noted"),
    [("ties", {"density": 0.5}, True), ("ties", {"density": 0.5, "trim": "model"}, False), ("ties", {}, False),
     ("task_arithmetic", {}, False), ("slerp", {"t": 0.5}, True)],
)  # fmt: skip
def test_parts_of_fused_tensors_are_said_to_be_taken_one_by_one(
    tmp_path: Path, method: str, parameters: dict[str, Any], noted: bool
) -> None:
    config = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_size": 8, "num_attention_heads": 2,
              "num_key_value_heads": 1, "intermediate_size": 6, "num_hidden_layers": 1}  # fmt: skip
    names = {"model.layers.0.self_attn.qkv_proj.weight": (16, 8), "model.layers.0.mlp.gate_up_proj.weight": (12, 8)}
    made = {
        name: checkpoint(tmp_path / name, {key: torch.full(shape, 0.5) for key, shape in names.items()}, config)
        for name in ("base", "a", "b")
    }
    weights = {"a": None, "b": None} if method == "slerp" else {"a": 0.5, "b": 0.5}
    base = None if method == "slerp" else "base"
    warnings = plan_of(recipe_of(made, method, weights, base, parameters=parameters)).warnings
    expected = f"{method} takes the parts of fused tensors (model.layers.0."
    assert any(one.startswith(expected) for one in warnings) is noted


def test_where_float32_measures_too_little_is_noted(folders: dict[str, Path]) -> None:
    plan = plan_of(recipe_of(folders, "arcee_fusion", ("base", "a"), "base"))
    (note,) = (said for said in plan.warnings if "divergences" in said)
    assert note.startswith("arcee_fusion computes divergences in float64.")
