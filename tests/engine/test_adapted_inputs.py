"""`BASE+ADAPTER` as an input of any merge: it counts as the checkpoint that folding would have made of the two."""

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
from plans import names_in, step_of
from polymerge.checkpoints import TensorInfo
from polymerge.engine.blocks import Updates
from polymerge.families.expressions import Adapted, Concat, Expr, Read, Rows, names_read
from polymerge.planning.text import describe, expression
from running import checkpoint, cli, merged, raw, recipe_file
from tiny import as_live, build, perturbed, related_llm

UP, HEAD, EMBEDDING = "language_model.model.layers.{}.mlp.up_proj.weight", "lm_head.weight", "embed_tokens.weight"
PREFIX = "base_model.model."


def adapter(folder: Path, factors: Mapping[str, tuple[int, int]], extras: Mapping[str, Tensor] | None = None) -> Path:
    """An adapter of rank 3 with random factors for modules of these shapes, [out, in], and full weights beside them."""
    generator = torch.Generator().manual_seed(5)
    tensors = dict(extras or {})
    for module, (out, width) in factors.items():
        tensors[f"{module}.lora_A.weight"] = torch.randn((3, width), generator=generator) * 0.1
        tensors[f"{module}.lora_B.weight"] = torch.randn((out, 3), generator=generator) * 0.1
    folder.mkdir()
    save_file({PREFIX + name: tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


TEXT = {f"model.language_model.layers.{layer}.mlp.up_proj": (48, 32) for layer in (0, 1)}
VISION = {"model.vision_tower.encoder.layers.0.mlp.fc1": (24, 16)}
PROJECTOR = "multi_modal_projector.linear_1.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A VLM with an adapter for its text, its vision and its projector, and relatives; `folded` is the fold of the two.

    All in float32, so that folding by itself rounds nothing that a merge would not.
    """
    root = tmp_path_factory.mktemp("models")
    vlm = build("llava", root / "vlm", dtype="float32")
    extras = {"model.multi_modal_projector.linear_1.weight": torch.full((32, 16), 0.25)}
    made = {
        "vlm": vlm,
        "other": as_live(perturbed(vlm, root / "other", seed=3)),
        "llm": related_llm(vlm, root / "llm", seed=4),
        "adapter": adapter(root / "adapter", TEXT | VISION, extras),
        "folded": root / "folded",
    }
    ran = cli("fold", made["adapter"], "--base", vlm, "-o", made["folded"], "--no-verify")
    assert ran.status == 0, ran.err
    assert raw(made["folded"]) != raw(vlm)
    return {**{name: str(folder) for name, folder in made.items()}, "both": f"{vlm}+{made['adapter']}"}


RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": ["X", "other"]},
    "linear, last": {"merge_method": "linear", "models": ["other", "X"]},
    "ties": {"merge_method": "ties", "models": ["X", "other"], "base_model": "vlm", "parameters": {"density": 0.4}},
    "ties, whole models": {
        "merge_method": "ties", "models": ["other", "X"], "base_model": "vlm",
        "parameters": {"density": 0.4, "trim": "model"},
    },
    "dare_ties": {"merge_method": "dare_ties", "models": ["X", "other"], "base_model": "vlm", "seed": 3,
                  "parameters": {"density": 0.5}},
    "slerp": {"merge_method": "slerp", "models": ["X", "other"], "parameters": {"t": 0.3}},
    "metagpt": {"merge_method": "metagpt", "models": ["X", "other"], "base_model": "vlm"},
    "as base": {"merge_method": "task_arithmetic", "models": ["vlm", "other"], "base_model": "X"},
    "text with a language model": {"merge_method": "linear", "models": ["X", "llm"]},
    "another's text": {"merge_method": "linear", "models": ["other", "X"], "parts": ["text"]},
    "some layers": {"merge_method": "linear", "models": ["X", "other"], "exclude": ["text.layers.0.*", "vision.*"]},
    "template only": {"merge_method": "linear", "template": "X", "models": ["other", "vlm"], "parts": ["text"]},
    "another dtype": {"merge_method": "linear", "models": ["X", "other"], "dtype": "bfloat16"},
}  # fmt: skip
WEIGHTLESS = ("slerp", "metagpt")


def recipe(models: dict[str, str], name: str, stands_for_x: str) -> dict[str, Any]:
    asked = dict(RECIPES[name])
    for field in ("template", "base_model"):
        if field in asked:
            asked[field] = models[stands_for_x if asked[field] == "X" else asked[field]]
    entries = [{"model": models[stands_for_x if model == "X" else model]} for model in asked["models"]]
    if asked["merge_method"] not in WEIGHTLESS:
        entries = [
            {**entry, "parameters": {"weight": weight}} for entry, weight in zip(entries, (0.7, 0.3), strict=True)
        ]
    return {**asked, "models": entries}


@pytest.mark.parametrize("name", RECIPES)
def test_a_merge_of_the_two_is_a_merge_of_what_they_fold_to(name: str, models: dict[str, str], tmp_path: Path) -> None:
    """Bit for bit: with a base in float32 folding rounds to what the merge would have gone on with."""
    at_once = polymerge.merge(recipe(models, name, "both"), tmp_path / "at once", check=False).folder
    after = polymerge.merge(recipe(models, name, "folded"), tmp_path / "after", check=False).folder
    without = polymerge.merge(recipe(models, name, "vlm"), tmp_path / "without", check=False).folder
    assert raw(at_once) == raw(after)
    assert raw(at_once) != raw(without)


def test_a_base_in_half_precision_is_rounded_once(tmp_path: Path) -> None:
    """Folding first rounds to bfloat16 on the way; the sum is within that rounding, and nearer to the exact one."""
    shape = (40, 24)
    generator = torch.Generator().manual_seed(1)
    name = "model.layers.0.mlp.up_proj.weight"
    numbers = [torch.randn(shape, generator=generator).bfloat16() for _ in range(2)]
    one, other = (checkpoint(tmp_path / str(place), {name: x}) for place, x in enumerate(numbers))
    learned = adapter(tmp_path / "adapter", {"model.layers.0.mlp.up_proj": shape})
    assert cli("fold", learned, "--base", one, "-o", tmp_path / "folded", "--no-verify").status == 0
    found = {}
    for label, model in (("at once", f"{one}+{learned}"), ("after", tmp_path / "folded")):
        entries = [
            {"model": str(model), "parameters": {"weight": 0.5}},
            {"model": str(other), "parameters": {"weight": 0.5}},
        ]
        asked = {"merge_method": "linear", "models": entries, "dtype": "float32"}
        found[label] = load_file(merged(asked, tmp_path / label, "--no-verify") / "model.safetensors")[name].double()
    factors = load_file(learned / "adapter_model.safetensors")
    stem = PREFIX + "model.layers.0.mlp.up_proj.lora_"
    update = factors[f"{stem}B.weight"].double() @ factors[f"{stem}A.weight"].double() * 4 / 3
    exact = (numbers[0].double() + update) / 2 + numbers[1].double() / 2
    largest = float((numbers[0].double() + update).abs().max())
    torch.testing.assert_close(found["at once"], exact, rtol=1e-6, atol=1e-6)
    off = (found["after"] - exact).abs().max()
    assert 1e-4 < off <= largest * 2**-8 / 2 + 1e-6  # half an ulp of bfloat16, times the weight


def test_a_template_keeps_what_its_adapter_made_of_other_parts(models: dict[str, str], tmp_path: Path) -> None:
    entries = [{"model": models[name], "parameters": {"weight": 0.5}} for name in ("both", "llm")]
    asked = recipe_file({"merge_method": "linear", "models": entries, "parts": ["text"]}, tmp_path / "recipe.yaml")
    ran = cli("merge", asked, "-o", tmp_path / "out")
    assert ran.status == 0, ran.err
    out, folded, plain = (raw(Path(folder)) for folder in (tmp_path / "out", models["folded"], models["vlm"]))
    outside = {name for name in out if not name.startswith("language_model.")}
    assert all(out[name] == folded[name] for name in outside)
    assert {name for name in outside if out[name] != plain[name]} == {
        PROJECTOR,
        "vision_tower.encoder.layers.0.mlp.fc1.weight",
    }
    assert all(out[name] not in (plain[name], folded[name]) for name in map(UP.format, (0, 1)))


# --- plans


def plan_of(models: dict[str, str], **fields: Any) -> polymerge.Plan:
    entries = [{"model": models[name], "parameters": {"weight": 0.5}} for name in ("both", "other")]
    return polymerge.plan({"merge_method": "linear", "models": entries, **fields})


def test_the_plan_says_what_is_merged_and_what_is_folded(models: dict[str, str]) -> None:
    plan = plan_of(models, parts=["text"])
    counts = plan.counts()
    assert (counts["folded"], counts["merged"], counts["tied"]) == (2, 21, 0)
    assert [step.name for step in plan.steps if step.fate == "folded"] == [
        PROJECTOR, "vision_tower.encoder.layers.0.mlp.fc1.weight",
    ]  # fmt: skip
    (piece,) = step_of(plan, PROJECTOR).pieces
    assert (piece.setting, piece.reads) == (None, (Read(f"adapter/{PREFIX}model.{PROJECTOR}"),))
    (piece,) = step_of(plan, UP.format(1)).pieces
    stem = f"adapter/{PREFIX}model.language_model.layers.1.mlp.up_proj.lora_"
    assert piece.reads[0] == Adapted(Read(UP.format(1)), f"{stem}A.weight", f"{stem}B.weight", 4 / 3)
    text = describe(plan).split("\n")
    up = UP.format("{i}")
    for line in (
        f"  adapter  template, model 0: family llava, {plan.inputs[0].tensors} tensors, 117.9 kB, {models['both']}",
        "folded: 2 tensors, 3.6 kB",
        f"  {PROJECTOR} <- adapter/{PREFIX}model.{PROJECTOR} (part projector is not merged)",
        "  vision_tower.encoder.layers.{i}.mlp.fc1.weight <- vision_tower.encoder.layers.{i}.mlp.fc1.weight + adapter "
        "(part vision is not merged)",
        f"  {up} [0] <- adapter {up} + adapter; other model.language_model.layers.{{i}}.mlp.up_proj.weight, i = 0-1",
    ):
        assert line in text, line


def test_the_plan_survives_json(models: dict[str, str], tmp_path: Path) -> None:
    plan = plan_of(models, parts=["text"])
    again = polymerge.plan(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.hash == plan.hash != plan_of({**models, "both": models["vlm"]}, parts=["text"]).hash
    made = polymerge.merge(again, tmp_path / "out", check=False)
    assert raw(made.folder) == raw(polymerge.merge(plan, tmp_path / "same", check=False).folder)


def test_every_tensor_of_both_is_read_or_left_out_with_its_reason(models: dict[str, str]) -> None:
    held = names_in(models["vlm"]) - {"__metadata__"} | {f"adapter/{name}" for name in names_in(models["adapter"])} - {
        "adapter/__metadata__"
    }
    swapped = {**models, "both": models["other"], "other": models["both"]}
    for plan, place in ((plan_of(models), 0), (plan_of(swapped, parts=["text"]), 1)):
        read = {step.name for step in plan.steps} if place == 0 else set()
        for step in plan.steps:
            for piece in step.pieces:
                for number, expr in zip(piece.inputs or plan.models, piece.reads, strict=True):
                    read |= set(names_read(expr)) if number == place else set()
        left = {entry.name: entry.reason for entry in plan.left_out if entry.input == place}
        assert not read & set(left)
        assert read | set(left) == held
    reasons = {
        name: left[name]
        for name in left
        if "projector.linear_1.weight" in name or ("fc1" in name and "layers.0" in name)
    }
    assert len(reasons) == 5 + 1
    own = reasons.pop(PROJECTOR)
    assert own == "its adapter has another in its place"
    for name, reason in reasons.items():
        part = "projector" if "projector" in name else "vision"
        assert reason == f"the template's is kept: part {part} is not merged", name


def test_the_hash_sees_the_scale_and_not_the_place(models: dict[str, str], tmp_path: Path) -> None:
    plan = plan_of(models)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in Path(models["adapter"]).iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    assert plan_of({**models, "both": f"{models['vlm']}+{moved}"}).hash == plan.hash
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 5}))
    assert plan_of({**models, "both": f"{models['vlm']}+{moved}"}).hash != plan.hash


def test_expressions_are_written_as_people_write_them() -> None:
    q = Adapted(Read("q"), "a", "b", 0.5)
    assert expression(q) == "q + adapter"
    assert expression(Concat((Rows(q, 0, 4), Read("v")))) == "cat((q + adapter)[0:4], v)"


# --- blocks of rows of what is adapted

ARRAYS = {
    "w": (9, 4), "A": (2, 4), "B": (9, 2), "emb": (7, 4), "eA": (2, 7), "eB": (4, 2), "rows": (2, 4),
    "n": (6,), "c": (6,),
}  # fmt: skip
W = Adapted(Read("w"), "A", "B", 0.5)
TWICE = Adapted(W, "A", "B", -0.25)
BOTH = Adapted(Concat((Rows(Read("emb"), 0, 2), Read("rows"), Rows(Read("emb"), 4, 7))), "eA", "eB", 2.0, True)
EXPRESSIONS = {
    "whole": W,
    "transposed": BOTH,
    "a vector": Adapted(Read("n"), None, "c", 0.5),
    "rows": Rows(W, 3, 7),
    "rows of rows": Rows(Rows(TWICE, 2, 9), 3, 6),
    "stacked": Concat((Rows(W, 5, 9), Read("emb"), Rows(BOTH, 1, 3), Rows(W, 0, 2))),
    "rows of stacked": Rows(Concat((Rows(W, 5, 9), Rows(BOTH, 2, 6), W)), 2, 12),
    "rows of a vector": Rows(Adapted(Read("n"), None, "c", 0.5), 2, 5),
}


def evaluated(expr: Expr, arrays: Mapping[str, Any], plain: bool = False) -> Any:
    """What an expression says, in numpy; without what is adapted in it if `plain`."""
    match expr:
        case Read(name):
            return arrays[name]
        case Rows(of, start, stop):
            return evaluated(of, arrays, plain)[start:stop]
        case Concat(of):
            return np.concatenate([evaluated(block, arrays, plain) for block in of])
        case Adapted(of, a, b, scale, flip):
            product = arrays[b] if a is None else arrays[b] @ arrays[a]
            return evaluated(of, arrays, plain) + (0 if plain else scale * (product.T if flip else product))


@pytest.mark.parametrize("expr", EXPRESSIONS.values(), ids=EXPRESSIONS)
@pytest.mark.parametrize("block", [1, 3, 5, 1000])
def test_updates_reach_the_elements_that_they_are_for(expr: Expr, block: int) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(0, 1, shape) for name, shape in ARRAYS.items()}
    entries = {name: TensorInfo(name, "F64", shape, Path(), 0, 0) for name, shape in ARRAYS.items()}
    updates = Updates(expr, entries, lambda entry: arrays[entry.name])
    out = np.array(evaluated(expr, arrays, plain=True)).ravel()
    for start in range(0, len(out), block):
        updates.add(out[start : start + block], start)
    np.testing.assert_allclose(out, evaluated(expr, arrays).ravel(), rtol=1e-12, atol=1e-12)


# --- other families


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_family_that_is_not_known(method: str, tmp_path: Path) -> None:
    """Names are equal or they are not; a weight that is stored [in, out] takes its update transposed."""
    config = {"model_type": "a model of tomorrow"}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(8, 6, generator=generator) for name in ("body.attn.weight", "tail.weight")}
    one = checkpoint(tmp_path / "one", tensors, config)
    other = checkpoint(tmp_path / "other", {name: x + 0.1 for name, x in tensors.items()}, config)
    learned = adapter(tmp_path / "adapter", {"body.attn": (6, 8)})
    said = json.loads((learned / "adapter_config.json").read_text())
    (learned / "adapter_config.json").write_text(json.dumps({**said, "fan_in_fan_out": True}))
    assert cli("fold", learned, "--base", one, "-o", tmp_path / "folded", "--no-verify").status == 0
    factors = load_file(learned / "adapter_model.safetensors")
    a, b = (factors[f"{PREFIX}body.attn.lora_{kind}.weight"].double() for kind in "AB")
    found = load_file(tmp_path / "folded" / "model.safetensors")
    expected = tensors["body.attn.weight"].double() + (b @ a).T * (4 / 3)
    torch.testing.assert_close(found["body.attn.weight"].double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found["tail.weight"], tensors["tail.weight"])
    outs = []
    for place, model in enumerate((f"{one}+{learned}", str(tmp_path / "folded"))):
        entries = [{"model": name, "parameters": {"weight": 0.5}} for name in (model, str(other))]
        base = {"base_model": str(one)} if method == "ties" else {}
        asked = {"merge_method": method, "models": entries, **base}
        outs.append(raw(polymerge.merge(asked, tmp_path / str(place), check=False).folder))
    assert outs[0] == outs[1]


def test_the_command_line_takes_them_without_a_recipe(models: dict[str, str], tmp_path: Path) -> None:
    words = ["--template", models["both"], "--with", models["other"], "--method", "linear", "--weight", "0.7,0.3"]
    ran = cli("merge", *words, "-o", tmp_path / "out", "--no-verify")
    assert ran.status == 0, ran.err
    expected = polymerge.merge(recipe(models, "linear", "both"), tmp_path / "same", check=False).folder
    assert raw(tmp_path / "out") == raw(expected)


def test_a_plus_in_the_name_of_a_folder(tmp_path: Path) -> None:
    """A path that exists is one model; else the adapter is what comes after the last plus that leaves one."""
    odd = tmp_path / "c++"
    odd.mkdir()
    base = checkpoint(odd / "a+b", {"model.layers.0.mlp.up_proj.weight": torch.ones(4, 3)})
    learned = adapter(odd / "c+d", {"model.layers.0.mlp.up_proj": (4, 3)})
    plan = polymerge.plan({"merge_method": "copy", "models": [f"{base}+{learned}"]})
    assert (plan.inputs[0].path, plan.inputs[0].adapter) == (str(base), str(learned))
    alone = polymerge.plan({"merge_method": "linear", "models": [{"model": str(base), "parameters": {"weight": 1}}]})
    assert (alone.inputs[0].path, alone.inputs[0].adapter) == (str(base), "")
