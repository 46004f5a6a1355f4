"""Recipes over adapters that cannot be merged: refused in words, with nothing left behind; and what `plan` says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_made import LAYER, PEFT_WARNINGS, PREFIX, adapter, recipe
from polymerge.families.expressions import names_read
from polymerge.planning import make_plan
from running import checkpoint, cli, loaded_by, merged, recipe_file, small_llama

pytestmark = PEFT_WARNINGS

STEM = PREFIX + LAYER.format(0, "q_proj")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few adapters, made once; a test that changes one copies it."""
    folder = tmp_path_factory.mktemp("adapters")
    adapter(folder / "a", 1)
    adapter(folder / "b", 2)
    adapter(folder / "rank4", 3, r=4)
    adapter(folder / "full", 4, modules_to_save=["lm_head"])
    adapter(folder / "other", 5)
    file = folder / "other" / "adapter_model.safetensors"
    save_file({name.replace(".layers.", ".blocks."): held for name, held in load_file(file).items()}, file)
    adapter(folder / "tokens", 6, trainable_token_indices=[1, 2])
    adapter(folder / "tokens2", 7, trainable_token_indices=[1, 3])
    checkpoint(folder / "model", small_llama(1))
    return folder


def refused(said: dict[str, Any], folder: Path, status: int = 2) -> str:
    """The message of a merge that ends with this status and leaves nothing behind."""
    file = recipe_file(said, folder / "recipe.yaml")
    before = {path.name for path in folder.iterdir()}
    ran = cli("merge", file, "-o", folder / "out")
    assert ran.status == status, ran.err
    assert {path.name for path in folder.iterdir()} == before
    return ran.err


def copied(made: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None], **config: Any) -> Path:
    """Adapter `b` with its tensors and its config changed."""
    target = folder / "changed"
    shutil.copytree(made / "b", target)
    held = load_file(target / "adapter_model.safetensors")
    change(held)
    save_file(held, target / "adapter_model.safetensors")
    file = target / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return target


def nothing(held: dict[str, torch.Tensor]) -> None:
    del held


def without_b(held: dict[str, torch.Tensor]) -> None:
    del held[f"{STEM}.lora_B.weight"]


def wider(held: dict[str, torch.Tensor]) -> None:
    held[f"{STEM}.lora_A.weight"] = torch.ones(3, 18)


CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], dict[str, Any], list[str]]] = {
    "A without B": (without_b, {}, [LAYER.format(0, "q_proj"), "has lora_A and no lora_B"]),
    "another shape": (wider, {}, [LAYER.format(0, "q_proj"), "[16, 16]", "[16, 18]", "different bases"]),
    "empty": (lambda held: held.clear(), {}, ["holds no tensors"]),
    "DoRA": (nothing, {"use_dora": True}, ["DoRA", "merge_and_unload"]),
    "another kind": (nothing, {"peft_type": "LOHA"}, ["'LOHA'", "only 'LORA'"]),
    "another base": (nothing, {"base_model_name_or_path": "org/other"}, ["different bases", "org/other", "base_model"]),
}


@pytest.mark.parametrize(("change", "config", "words"), CHANGES.values(), ids=CHANGES)
def test_adapters_that_are_refused(
    made: Path, tmp_path: Path, change: Callable[..., None], config: dict[str, Any], words: list[str]
) -> None:
    a = made / "a"
    if "base_model_name_or_path" in config:
        (tmp_path / "in").mkdir()
        a = copied(made, tmp_path / "in", nothing, base_model_name_or_path="org/this")
    # 1: an input is broken or beyond what can be merged; 2: inputs that do not belong together make a bad recipe
    status = 2 if "different bases" in words else 1
    message = refused(recipe("cat", [a, copied(made, tmp_path, change, **config)]), tmp_path, status)
    for word in words:
        assert word in message


def test_two_bases_that_are_one_are_said_by_base_model(made: Path, tmp_path: Path) -> None:
    named = []
    for name in ("org/this", "org/other"):
        (tmp_path / name).mkdir(parents=True)
        named.append(copied(made, tmp_path / name, nothing, base_model_name_or_path=name))
    assert "different bases" in refused(recipe("cat", named), tmp_path)
    out = merged(recipe("cat", named, base_model="org/this"), tmp_path / "out")
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/this"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_when_it_is_read(made: Path, tmp_path: Path, value: float) -> None:
    def spoil(held: dict[str, torch.Tensor]) -> None:
        held[f"{STEM}.lora_B.weight"][0, 0] = value

    changed = copied(made, tmp_path, spoil)
    message = refused(recipe("cat", [made / "a", changed]), tmp_path, 1)
    assert f"{STEM}.lora_B.weight of 'changed' holds NaN or infinity" in message
    # where it is only copied, too
    message = refused(recipe("cat", [changed]), tmp_path, 1)
    assert f"{STEM}.lora_B.weight of 'changed' holds NaN or infinity" in message


def test_values_that_overflow_are_refused(made: Path, tmp_path: Path) -> None:
    message = refused(recipe("cat", [made / "a", made / "b"], 1e38, dtype="float16"), tmp_path, 1)
    assert "too large" in message or "NaN" in message


def test_families_that_differ(made: Path, tmp_path: Path) -> None:
    folders = []
    for kind in ("llava", "qwen2_vl"):
        shutil.copytree(made / "a", tmp_path / kind)
        (tmp_path / kind / "config.json").write_text(json.dumps({"model_type": kind}))
        folders.append(tmp_path / kind)
    message = refused(recipe("cat", folders), tmp_path)
    assert "different families: 'llava' is for a llava, 'qwen2_vl' is for a qwen2_vl" in message


RECIPES: dict[str, tuple[str, list[str], Any, dict[str, Any], list[str]]] = {
    "no module in common": ("cat", ["a", "other"], 1, {}, ["'a' has no module in common", "self_attn.q_proj"]),
    "ranks, robustmerge": ("robustmerge", ["a", "rank4"], None, {}, ["3 'a', 4 'rank4'", "another method"]),
    "ranks, factors": ("ties", ["a", "rank4"], 1, {"parameters": {"space": "factors"}}, ["3 'a', 4 'rank4'", "knots"]),
    "a checkpoint": ("linear", ["a", "model"], 1, {}, ["a' is an adapter", "model' is not", "BASE+ADAPTER"]),
    "parts": ("linear", ["a", "b"], 1, {"parts": ["text"]}, ["parts is for checkpoints"]),
    "vocab": ("linear", ["a", "b"], 1, {"vocab": "overlap"}, ["vocab is for checkpoints"]),
    "slerp": ("slerp", ["a", "b"], None, {"parameters": {"t": 0.5}}, ["slerp works on checkpoints, not on adapters"]),
    "metagpt": ("metagpt", ["a", "b"], None, {}, ["metagpt works on checkpoints"]),
    "trim": ("ties", ["a", "b"], 1, {"parameters": {"trim": "model"}}, ["trim: model is for checkpoints"]),
    "space of checkpoints": ("linear", ["model"], 1, {"parameters": {"space": "core"}}, ["space is for adapters"]),
    "rank of checkpoints": ("linear", ["model"], 1, {"parameters": {"rank": 2}}, ["rank is for adapters"]),
    "robustmerge of checkpoints": ("robustmerge", ["model"], None, {}, ["robustmerge merges adapters"]),
    "cat of checkpoints": ("cat", ["model"], 1, {}, ["cat merges adapters"]),
    "a space that is none": ("ties", ["a", "b"], 1, {"parameters": {"space": "knot"}}, ["'knot'", "'knots'"]),
    "space of cat": ("cat", ["a", "b"], 1, {"parameters": {"space": "knots"}}, ["merges factors in its own way"]),
    "rank 0": ("svd", ["a", "b"], 1, {"parameters": {"rank": 0}}, ["rank has to be an integer from 1, got '0'"]),
    "half a rank": ("svd", ["a", "b"], 1, {"parameters": {"rank": 1.5}}, ["has to be an integer from 1, got '1.5'"]),
    "no weight": ("cat", ["a", "b"], [1, None], {}, ["models[1] 'b'", "needs `weight`"]),
    "weight of robustmerge": ("robustmerge", ["a", "b"], 1, {}, ["no parameter 'weight'"]),
    "named twice": ("cat", ["a", "a"], 1, {}, ["named twice"]),
    "exclude": ("cat", ["a", "b"], 1, {"exclude": ["vision.*"]}, ["'vision.*' matches no module or weight"]),
    "match": ("cat", ["a", "b"], 1, {"overrides": [{"match": "x", "merge_method": "copy"}]}, ["'x' matches no module"]),
    "match of a full weight": (
        "cat", ["full", "b"], 1, {"overrides": [{"match": "lm_head.weight", "merge_method": "copy"}]},
        ["'lm_head.weight' matches no module", "parameter extra"],
    ),
    "layers of names unknown": (
        "cat", ["a", "b"], 1, {"overrides": [{"layers": "0-1", "merge_method": "copy"}]},
        ["layers 0-1 hold no module", "base_model, a local folder"],
    ),
    "template": ("cat", ["a", "b"], 1, {"template": "c"}, ["template 'c' has to be one of the adapters"]),
    "deltas without a base": ("cat", ["a", "full"], 1, {"parameters": {"extra": "ties"}}, ["needs base_model"]),
    "other tokens": ("cat", ["tokens", "tokens2"], 1, {}, ["trained tokens [1, 2]", "[1, 3]", "Fold"]),
    "weights that cancel": ("linear", ["a", "b"], [1, -1], {}, ["add up to about 0", "normalize: false"]),
}  # fmt: skip


@pytest.mark.parametrize(("method", "names", "weight", "more", "words"), RECIPES.values(), ids=RECIPES)
def test_recipes_that_are_refused(
    made: Path, tmp_path: Path, method: str, names: list[str], weight: Any, more: dict[str, Any], words: list[str]
) -> None:
    message = refused(recipe(method, [made / name for name in names], weight, **more), tmp_path)
    for word in words:
        assert word in message


def test_all_problems_at_once(made: Path, tmp_path: Path) -> None:
    said = recipe(
        "ties", [made / "a", copied(made, tmp_path, wider), made / "rank4"], [1, None, 1], vocab="overlap",
        template="c", exclude=["none.*"], parameters={"space": "factors", "rank": 0, "trim": "model"},
    )  # fmt: skip
    message = refused(said, tmp_path)
    for word in (
        "needs `weight`", "vocab is for checkpoints", "template 'c'", "'none.*'", "rank has to be an integer",
        "trim: model", "[16, 18]", "the ranks differ",
    ):  # fmt: skip
        assert word in message, word


def test_layout_is_for_adapters(made: Path, tmp_path: Path) -> None:
    file = recipe_file(recipe("linear", [made / "model"]), tmp_path / "recipe.yaml")
    ran = cli("merge", file, "-o", tmp_path / "out", "--layout", "peft")
    assert ran.status == 2
    assert "layout: is for adapters" in ran.err
    assert not (tmp_path / "out").exists()


# --- what `plan` says


def some(made: Path, **more: Any) -> dict[str, Any]:
    return recipe("ties", [made / "a", made / "rank4", made / "full"], [1, 0.5, 0.25], **more)


def test_plan_names_what_only_some_have(made: Path, tmp_path: Path) -> None:
    wide = adapter(tmp_path / "wide", 8, target_modules=["q_proj", "v_proj"])
    ran = cli("plan", recipe_file(recipe("cat", [made / "a", made / "full", wide]), tmp_path / "recipe.yaml"))
    assert ran.status == 0
    assert "only 1 of 3 adapters have it: wide" in ran.out
    assert "only full of the adapters" in ran.out
    assert "cat of 3 adapters" in ran.out


def test_plan_as_json_comes_back(made: Path, tmp_path: Path) -> None:
    file = recipe_file(some(made, exclude=[LAYER.format(1, "q_proj")], dtype="bfloat16"), tmp_path / "recipe.yaml")
    ran = cli("plan", file, "--json", "-")
    assert ran.status == 0
    data = json.loads(ran.out)
    plan = make_plan(file)
    assert data["hash"] == plan.hash
    assert data == {**plan.to_json(), "hash": plan.hash}
    assert make_plan(data) == plan
    assert make_plan(plan.to_json()).hash == plan.hash
    out = merged(json.loads(json.dumps(some(made, dtype="bfloat16"))), tmp_path / "out")
    assert json.loads((out / "polymerge.json").read_text())["plan_hash"] == make_plan(some(made, dtype="bfloat16")).hash


def test_the_hash_is_of_what_is_computed(made: Path, tmp_path: Path) -> None:
    there = tmp_path / "elsewhere"
    for name in ("a", "rank4", "full"):
        shutil.copytree(made / name, there / f"its-{name}")
    moved = recipe("ties", [there / f"its-{name}" for name in ("a", "rank4", "full")], [1, 0.5, 0.25])
    first = make_plan(some(made)).hash
    assert make_plan(moved).hash == first == make_plan(some(made)).hash
    changes: list[dict[str, Any]] = [
        {"parameters": {"density": 0.5}}, {"parameters": {"rank": 2}}, {"parameters": {"extra": "first"}},
        {"dtype": "float16"}, {"seed": 5}, {"exclude": ["lm_head.weight"]}, {"parameters": {"space": "core"}},
    ]  # fmt: skip
    hashes = [make_plan(some(made, **change)).hash for change in changes]
    assert len({first, *hashes}) == len(changes) + 1


def test_every_tensor_has_its_fate(made: Path) -> None:
    said = recipe(
        "cat", [made / "a", made / "full", made / "tokens", made / "rank4"], exclude=[LAYER.format(0, "q_proj")]
    )
    plan = make_plan(said | {"parameters": {"extra": "first"}})
    read: set[tuple[int, str]] = set()
    for step in plan.steps:
        (piece,) = step.pieces
        reads = zip(piece.inputs, piece.reads, strict=True)
        read |= {(place, name) for place, expr in reads for name in names_read(expr)}
    left = {(one.input, one.name) for one in plan.left_out}
    assert not read & left
    held = {
        (place, name)
        for place, entry in enumerate(plan.inputs)
        for name in load_file(Path(entry.path) / "adapter_model.safetensors")
    }
    assert read | left == held


def test_plan_needs_neither_torch_nor_numpy(made: Path, tmp_path: Path) -> None:
    file = recipe_file(some(made), tmp_path / "recipe.yaml")
    code = f"""
import sys
from polymerge.cli import main
sys.argv = ["polymerge", "plan", {str(file)!r}]
try:
    main()
except SystemExit as end:
    assert not end.code
"""
    loaded = loaded_by(code)
    assert "polymerge" in loaded
    assert not loaded & {"torch", "numpy", "numba", "transformers", "peft", "safetensors"}


def test_weights_that_add_up_to_nothing_are_found_by_the_plan(made: Path, tmp_path: Path) -> None:
    file = recipe_file(recipe("linear", [made / "a", made / "b"], [1, -1]), tmp_path / "recipe.yaml")
    ran = cli("plan", file)
    assert ran.status == 2
    assert "linear: the weights add up to about 0 and cannot be normalized" in ran.err


def test_weights_of_those_that_have_a_module_are_added_up_as_well(tmp_path: Path) -> None:
    both = [adapter(tmp_path / name, seed, target_modules=["q_proj"]) for seed, name in enumerate(("one", "other"))]
    more = adapter(tmp_path / "more", 3, target_modules=["q_proj", "k_proj"])
    file = recipe_file(recipe("linear", [*both, more], [0.1, 0.2, 1]), tmp_path / "recipe.yaml")
    assert cli("plan", file).status == 0
    file = recipe_file(recipe("linear", [more, *both], [1, 0.3, 1e-9]), tmp_path / "recipe.yaml")
    assert cli("plan", file).status == 0
    full = [adapter(tmp_path / f"full {name}", seed, target_modules=["q_proj"], modules_to_save=["lm_head"])
            for seed, name in enumerate(("one", "other"))]  # fmt: skip
    said = recipe("linear", [*full, more], [0.5, -0.5, 1], parameters={"extra": "linear"})
    ran = cli("plan", recipe_file(said, tmp_path / "recipe.yaml"))
    assert ran.status == 2
    assert "only full one, full other of the adapters, and their weights add up to about 0" in ran.err
    wide = [adapter(tmp_path / f"wide {name}", seed, target_modules=["q_proj", "v_proj"])
            for seed, name in enumerate(("one", "other"))]  # fmt: skip
    ran = cli("plan", recipe_file(recipe("linear", [*wide, more], [0.5, -0.5, 1]), tmp_path / "recipe.yaml"))
    assert ran.status == 2
    assert "only 2 of 3 adapters have it: wide one, wide other, and their weights add up to about 0" in ran.err
