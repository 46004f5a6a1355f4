"""Experts: one by one, or all of a layer in one tensor, either way up. What is merged does not depend on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import polymerge
from bits import same_bits
from polymerge.analysis.baseline import open_baseline
from polymerge.analysis.replacements import Cell, Replacement, knocked_out
from polymerge.checkpoints import open_checkpoint
from polymerge.engine.device import Torch
from polymerge.engine.extents import Files, clip, extents
from polymerge.errors import CheckpointError, Refused
from polymerge.families.expressions import Concat, Read, Rows, Stacked, expr_from_json, expr_to_json, shape_of
from polymerge.families.resolve import Stack, map_names
from polymerge.families.rules import Family, Rule
from polymerge.inference.live import LiveModel
from polymerge.planning.text import expression
from running import checkpoint, cli, merged, raw, recipe_file
from tiny import as_2024, as_live, build, generate, load, open_model, perturbed, related_llm
from tiny_experts import apart, fused

Models = Mapping[str, Path]

ALL = Family(
    "all",
    rules=(
        Rule("layers.{i}.in", ("text.layers.{i}.{e}.gate", "text.layers.{i}.{e}.up"), split="experts_in"),
        Rule("layers.{i}.out", "text.layers.{i}.{e}.down", split="experts_out"),
    ),
)
SETTINGS: Mapping[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear"},
    "ties": {"merge_method": "ties", "parameters": {"density": 0.3}},
    "ties, one threshold": {"merge_method": "ties", "parameters": {"density": 0.3, "trim": "model"}},
    "dare_ties": {"merge_method": "dare_ties", "parameters": {"density": 0.4}},
    "slerp": {"merge_method": "slerp", "parameters": {"t": 0.3}},
    "one expert apart": {"merge_method": "linear", "exclude": ["*.0.mlp.experts.1.*", "*.1.mlp.experts.0.up_proj.*"]},
    "another dtype": {"merge_method": "linear", "dtype": "float32", "exclude": ["*.experts.1.*"]},
}


# --- names and shapes


def shapes(inner: tuple[int, ...], outer: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"layers.3.in": inner, "layers.3.out": outer}


@pytest.mark.parametrize(
    ("inner", "outer", "transposed"),
    [
        ((2, 10, 4), (2, 4, 5), (False, False)),
        ((2, 4, 10), (2, 5, 4), (True, True)),
        # what is square is as the others are, and as a linear layer has it where all are
        ((2, 4, 4), (2, 5, 4), (True, True)),
        ((2, 4, 4), (2, 4, 5), (False, False)),
        ((2, 4, 4), (2, 4, 4), (False, False)),
    ],
)
def test_the_shape_tells_which_way_up_an_expert_is(
    inner: tuple[int, ...], outer: tuple[int, ...], transposed: tuple[bool, bool]
) -> None:
    found = shapes(inner, outer)
    mapped = map_names(ALL, found, "here", {"experts_in": Stack(2, columns=4), "experts_out": Stack(2, rows=4)}, found)
    assert mapped.problems == ()
    assert [mapped.views[name] for name in found] == [
        Stacked(Read(name), way) for name, way in zip(found, transposed, strict=True)
    ]
    half = (inner[2] if transposed[0] else inner[1]) // 2
    assert mapped.tensors["text.layers.3.1.up"] == Rows(mapped.views["layers.3.in"], 3 * half, 4 * half)
    assert shape_of(mapped.tensors["text.layers.3.0.gate"], found) == (half, 4)
    assert shape_of(mapped.tensors["text.layers.3.1.down"], found)[0] == 4
    assert len(mapped.tensors) == 6
    assert (
        expr_from_json(json.loads(json.dumps(expr_to_json(mapped.tensors["text.layers.3.1.up"]))))
        == (mapped.tensors["text.layers.3.1.up"])
    )


@pytest.mark.parametrize(
    ("shape", "stack", "said"),
    [
        ((2, 10, 5), Stack(2, columns=4), r"is \[2, 10, 5\], .* asks for 2 x \[..., 4\], or each of them transposed"),
        ((3, 10, 4), Stack(2, columns=4), r"is \[3, 10, 4\], .* asks for 2 x"),
        ((10, 4), Stack(columns=4), r"is \[10, 4\], .* asks for experts x"),
        # gate and up are equally many rows
        ((2, 9, 4), Stack(2, columns=4), r"is \[2, 9, 4\]"),
        ((0, 10, 4), Stack(columns=4), r"is \[0, 10, 4\]"),
        ((2, 0, 4), Stack(columns=4), r"is \[2, 0, 4\]"),
    ],
)
def test_a_shape_that_no_expert_has_is_an_error(shape: tuple[int, ...], stack: Stack, said: str) -> None:
    (problem,) = map_names(ALL, ["layers.0.in"], "here", {"experts_in": stack}, {"layers.0.in": shape}).problems
    assert isinstance(problem, CheckpointError)
    with pytest.raises(CheckpointError, match=rf"here: 'layers.0.in' {said}.*Mend config.json or the file"):
        raise problem


def test_experts_lie_one_way_in_all_of_a_checkpoint() -> None:
    found = {f"layers.{layer}.{end}": (2, 10, 4) if layer else (2, 4, 10) for layer in range(3) for end in ("in",)}
    mapped = map_names(ALL, found, "here", {"experts_in": Stack(columns=4)}, found)
    (problem,) = mapped.problems
    assert "'layers.0.in' [2, 4, 10] lie transposed, those of 'layers.1.in' [2, 10, 4] do not" in str(problem)
    assert mapped.lost == ("layers.0.in",)


def test_experts_that_are_there_twice_are_one_problem(tmp_path: Path) -> None:
    llm, other = build("qwen3_moe", tmp_path / "llm"), build("qwen3_moe", tmp_path / "other")
    save_file({**load(llm), **fused(load(llm))}, llm / "model.safetensors", metadata={"format": "pt"})
    ran = cli("plan", recipe_file(plain(llm, other), tmp_path / "recipe.yaml"))
    assert "2 problems" in ran.err
    assert "experts.gate_up_proj' both mean text.layers.0.mlp.experts.1.up_proj.weight" in ran.err


# --- bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5, 40), (2, 40, 5), (1, 1, 7), (2, 7, 1)])
def test_any_run_of_a_transposed_tensor_is_read_as_it_is(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    count, columns, rows = shape
    tensor = torch.arange(count * columns * rows).reshape(shape).to(dtype)
    folder = checkpoint(tmp_path / "model", {"before": torch.zeros(1, dtype=dtype), "w": tensor})
    entries = open_checkpoint(str(folder), folder).entries
    seen = tensor.mT.reshape(-1, columns)
    generator = np.random.default_rng(0)
    files = Files()
    try:
        for _ in range(40):
            first, last = np.sort(generator.choice(count * rows + 1, 2, replace=False)).tolist()
            runs = extents(Rows(Stacked(Read("w"), True), first, last), entries)
            flat = seen[first:last].reshape(-1)
            start, stop = np.sort(generator.choice(len(flat) + 1, 2, replace=False)).tolist()
            read = bytearray()
            for run in clip(runs, start, stop):
                part = bytearray(run.count * tensor.itemsize)
                files.fill(run, memoryview(part))
                read += part
            assert torch.equal(torch.frombuffer(read, dtype=dtype), flat[start:stop])
        whole = extents(Stacked(Read("w"), True), entries)
        assert sum(run.count for run in whole) == tensor.numel()
    finally:
        files.close()


# --- merges


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A VLM, the language model that it may be made of, and a fine-tune of that; each in every way there is."""
    folder = tmp_path_factory.mktemp("models")
    vlm = build("qwen3_vl_moe", folder / "vlm")
    base = related_llm(vlm, folder / "base", seed=1)
    tuned = perturbed(base, folder / "tuned", seed=2)
    made = {"vlm": vlm, "base": base, "tuned": tuned}
    for name, other_way in (("vlm", as_2024), ("base", as_live), ("tuned", as_live)):
        again = folder / f"{name} the other way"
        again.mkdir()
        for file in made[name].iterdir():
            (again / file.name).write_bytes(file.read_bytes())
        made[f"{name} the other way"] = other_way(again)
    assert load(made["vlm the other way"])["model.language_model.layers.0.mlp.experts.gate_up_proj"].shape == (
        2,
        32,
        48,
    )
    return made


def recipe(models: Models, name: str, template: str, other: str, **more: Any) -> dict[str, Any]:
    setting = SETTINGS[name]
    base = models[other.replace("tuned", "base")]
    if setting["merge_method"] in ("linear", "slerp"):
        weights = [{"weight": 0.7}, {"weight": 0.3}] if setting["merge_method"] == "linear" else [{}, {}]
    else:
        weights, more = [{"weight": 0.7}, {"weight": 0.3}], {"base_model": str(base), **more}
    pair = [
        {"model": str(models[key]), "parameters": said} for key, said in zip((template, other), weights, strict=True)
    ]
    return {"models": pair, "template": str(models[template]), **setting, **more}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_merge_does_not_depend_on_how_experts_lie(setting: str, models: Models, tmp_path: Path) -> None:
    results = []
    for place, (vlm, other) in enumerate((one, two) for one in ways("vlm") for two in ways("tuned")):
        plan = polymerge.plan(recipe(models, setting, vlm, other))
        for block in (1 << 19, 100):  # whole matrices, and a few rows of one
            out = tmp_path / f"{place} {block}"
            polymerge.merge(plan, out, threads=3, block=block)
            assert {name: tensor.shape for name, tensor in load(out).items()} == {
                name: tensor.shape for name, tensor in load(models[vlm]).items()
            }
            results.append(apart(load(out)))
    for result in results[1:]:
        assert same(result, results[0])
    untouched = apart(load(models["vlm"]))
    experts = [name for name in untouched if ".experts." in name]
    kept = {name for name in experts if torch.equal(results[0][name].float(), untouched[name].float())}
    assert len(experts) == 12
    assert len(kept) == {"one expert apart": 4, "another dtype": 6}.get(setting, 0)


def ways(name: str) -> tuple[str, str]:
    return name, f"{name} the other way"


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def test_torch_computes_the_same_bits(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = polymerge.plan(recipe(models, "ties", "vlm the other way", "tuned the other way"))
    polymerge.merge(plan, tmp_path / "here", check=False)
    opened = []
    monkeypatch.setattr("polymerge.engine.merge.open_device", lambda name: opened.append(name) or Torch("cpu"))
    polymerge.merge(plan, tmp_path / "torch", check=False, block=1000)
    assert opened == ["cpu"]
    assert raw(tmp_path / "torch") == raw(tmp_path / "here")


@pytest.mark.parametrize("template", ways("tuned"))
@pytest.mark.parametrize("vlm", ways("vlm"))
def test_a_language_model_takes_experts_from_a_vlm(template: str, vlm: str, models: Models, tmp_path: Path) -> None:
    out = merged({**recipe(models, "linear", template, vlm), "parts": ["text"]}, tmp_path / "out")
    ours, theirs = apart(load(models[template])), apart(load(models[vlm]))
    expected = {}
    for name, tensor in ours.items():
        seen = theirs[name.replace("model.", "model.language_model.") if name != "lm_head.weight" else name]
        expected[name] = (0.7 * tensor.float() + 0.3 * seen.float()).bfloat16()
    assert same(apart(load(out)), expected)
    assert load(out).keys() == load(models[template]).keys()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_language_models_merge_with_their_like_either_way(family: str, tmp_path: Path) -> None:
    one, other = build(family, tmp_path / "one"), build(family, tmp_path / "other", seed=1)
    apart_out = merged(plain(one, other), tmp_path / "out")
    for place, folders in enumerate(((one, as_live(other)), (as_live(one), other))):
        out = merged(plain(*folders), tmp_path / f"out{place}")
        assert same(apart(load(out)), apart(load(apart_out)))
        assert same(open_model(out).state_dict(), open_model(apart_out).state_dict())
        generate(out, tokens=1)


def plain(one: Path, other: Path) -> dict[str, Any]:
    pair = [{"model": str(model), "parameters": {"weight": weight}} for model, weight in ((one, 0.7), (other, 0.3))]
    return {"merge_method": "linear", "models": pair}


@pytest.mark.parametrize("vlm", ways("vlm"))
def test_what_the_recipe_keeps_is_kept_to_the_last_byte(vlm: str, models: Models, tmp_path: Path) -> None:
    said = {**recipe(models, "linear", vlm, "tuned"), "exclude": ["*.mlp.experts.*"]}
    out = merged(said, tmp_path / "out")
    before, after = raw(models[vlm]), raw(out)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if ".language_model." in name and ".experts." not in name} | {
        "lm_head.weight"
    }
    plan = json.loads(cli("plan", recipe_file(said, tmp_path / "recipe.yaml"), "--json", "-").out)
    reasons = {step["reason"] for step in plan["steps"] if ".experts." in step["name"]}
    assert reasons == {"excluded by the recipe"}


def test_a_plan_says_which_experts_are_kept(models: Models) -> None:
    def reasons(setting: str) -> list[str]:
        steps = polymerge.plan(recipe(models, setting, "vlm", "tuned")).steps
        return sorted(step.reason for step in steps if ".experts." in step.name and step.reason)

    kept = "is the template's: excluded by the recipe"
    more = "and 1 more are the template's: excluded by the recipe"
    first, second = (f"text.layers.{layer}.mlp.experts" for layer in (0, 1))
    assert reasons("one expert apart") == [
        f"{first}.1.down_proj.weight {kept}",
        f"{first}.1.gate_proj.weight {more}",
        f"{second}.0.up_proj.weight {kept}",
    ]
    assert f"{first}.1.gate_proj.weight {more} (as F32, like the rest)" in reasons("another dtype")
    with pytest.raises(Refused, match=r"Did you mean 'text.layers.\*.mlp.experts.\*.gate_proj.weight'"):
        polymerge.plan(
            {**recipe(models, "linear", "vlm", "tuned"), "exclude": ["text.layers.*.mlp.experts.gate_proj.weight"]}
        )


def test_a_plan_shows_how_experts_are_read(models: Models, tmp_path: Path) -> None:
    said = recipe(models, "linear", "vlm the other way", "tuned the other way")
    ran = cli("plan", recipe_file(said, tmp_path / "recipe.yaml"), "--full")
    assert ran.status == 0, ran.err
    (line,) = (line for line in ran.out.splitlines() if "layers.0.mlp.experts.gate_up_proj [0]" in line)
    assert "tuned the other way cat(model.layers.0.mlp.experts.gate_up_proj[0:24]," in line
    assert "normalize true): 33 tensors, in 25 that are stored" in ran.out
    twenty = Concat(tuple(Read(f"experts.{expert}") for expert in range(20)))
    assert expression(twenty) == "cat(experts.0, ..., experts.19: 20 blocks)"
    assert expression(Rows(Stacked(Read("all"), True), 0, 8)) == "all.T[0:8]"


def test_a_config_that_counts_other_experts_is_refused(models: Models, tmp_path: Path) -> None:
    folder = tmp_path / "vlm"
    folder.mkdir()
    for file in models["vlm"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_experts"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    ran = cli("plan", recipe_file(plain(folder, models["base"]), tmp_path / "recipe.yaml"))
    assert ran.status != 0
    assert "experts.down_proj' (1 more like it) is [2, 32, 24], its config.json asks for 3 x [32, ...]" in ran.err
    assert "2 problems" in ran.err
    del config["text_config"]["hidden_size"]
    del config["text_config"]["num_experts"]
    (folder / "config.json").write_text(json.dumps(config))
    said = cli("inspect", folder)
    assert "experts.down_proj' (1 more like it) is [2, 32, 24]" in said.err


# --- models in memory


@pytest.mark.parametrize("vlm", ways("vlm"))
@pytest.mark.parametrize("other", ways("tuned"))
def test_a_live_model_has_the_bits_of_the_folder(vlm: str, other: str, models: Models, tmp_path: Path) -> None:
    plans = [polymerge.plan(recipe(models, name, vlm, other)) for name in ("ties", "one expert apart")]
    live = LiveModel(plans[0])
    for number, plan in enumerate((*plans, plans[0])):
        live.set(plan)
        out = tmp_path / str(number)
        polymerge.merge(plan, out, check=False)
        same_bits(live.model, open_model(out))


@pytest.mark.parametrize("vlm", ways("vlm"))
def test_a_knockout_of_experts_divides_by_what_each_matrix_writes(vlm: str, models: Models) -> None:
    baseline = open_baseline(str(models[vlm]), "model")
    assert baseline is not None
    cells = [Cell("mlp", (1,))]
    plan = knocked_out(baseline, cells, Replacement("uniform"))[cells[0].name]
    live = LiveModel(plan)
    before = {name: tensor.clone() for name, tensor in live.model.state_dict().items()}
    live.set(plan)
    for name, tensor in live.model.state_dict().items():
        if ".layers.1.mlp." in name and "visual" not in name:
            rows = {"gate_up_proj": 24, "down_proj": 32, "weight": 2}[name.rpartition(".")[2]]
            assert torch.equal(tensor, torch.full_like(tensor, 1 / rows)), name
        else:
            assert torch.equal(tensor, before[name]), name


def test_overlap_is_the_same_either_way(models: Models, tmp_path: Path) -> None:
    found = []
    for vlm, other in (("vlm", "tuned"), ("vlm the other way", "tuned the other way")):
        out = tmp_path / f"{vlm}.json"
        asked = recipe_file(recipe(models, "ties", vlm, other), tmp_path / f"{vlm}.yaml")
        ran = cli("overlap", asked, "--json", out)
        assert ran.status == 0, ran.err
        told = json.loads(out.read_text().replace(" the other way", ""))["tensors"]
        found.append({entry["name"]: entry for entry in told})
    assert found[0] == found[1]
    assert sum(".experts." in name for name in found[0]) == 12


# --- adapters


def adapter(folder: Path, base: Path, seed: int) -> Path:
    """Factors of one module, and the experts of a layer in full, as they lie in memory."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    layer = "base_model.model.model.layers.0."
    tensors = {
        f"{layer}self_attn.q_proj.lora_A.weight": torch.randn(2, 32, generator=generator),
        f"{layer}self_attn.q_proj.lora_B.weight": torch.randn(32, 2, generator=generator),
        f"{layer}mlp.experts.gate_up_proj": torch.randn(2, 48, 32, generator=generator).bfloat16(),
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["experts"]}
    config = {**said, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder


def test_adapters_with_experts_in_full_are_merged_against_a_base(models: Models, tmp_path: Path) -> None:
    base = models["base the other way"]
    pair = [adapter(tmp_path / str(seed), base, seed) for seed in (1, 2)]
    said = {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [{"model": str(one), "parameters": {"weight": 0.5}} for one in pair],
        "parameters": {"extra": "task_arithmetic"},
    }
    name = "base_model.model.model.layers.0.mlp.experts.gate_up_proj"
    # PEFT would want the experts' down_proj as well, which these adapters leave out
    out = load_file(merged(said, tmp_path / "out", "--no-verify") / "adapter_model.safetensors")
    own, *theirs = [
        load(base)["model.layers.0.mlp.experts.gate_up_proj"].float(),
        *(load_file(one / "adapter_model.safetensors")[name].float() for one in pair),
    ]
    expected = own + 0.5 * (theirs[0] - own) + 0.5 * (theirs[1] - own)
    assert torch.allclose(out[name].float(), expected, rtol=2**-7)
    plan = polymerge.plan({**said, "exclude": ["*.mlp.experts.*"]})
    (full,) = (step for step in plan.steps if step.lora is None)
    assert full.canonical == "text.layers.0.mlp.experts.gate_proj.weight+text.layers.0.mlp.experts.up_proj.weight"
    assert full.fate == "copied"


def test_an_adapter_of_a_language_model_finds_its_experts_in_a_vlm(models: Models, tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", models["base"], 1)
    out = tmp_path / "out"
    ran = cli("fold", one, "--base", models["vlm"], "-o", out)
    assert ran.status == 0, ran.err
    name = "model.layers.0.mlp.experts.gate_up_proj"
    held = load_file(one / "adapter_model.safetensors")[f"base_model.model.{name}"]
    assert torch.equal(load(out)[name.replace("model.", "model.language_model.", 1)], held)
    for other in ("base", "vlm the other way"):
        ran = cli("fold", one, "--base", models[other], "-o", tmp_path / "none")
        assert ran.status == 2
        assert "experts.gate_up_proj" in ran.err
