"""Plans as wholes: their hash, their text, what planning loads, and models of real size."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import polymerge
from headers_only import llm, vlm
from plans import model_folders, recipe_of
from polymerge.errors import human_size
from polymerge.families.expressions import Concat, Read, Rows
from polymerge.planning.text import describe, expression
from running import linear


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    model_folders(folder)
    return folder


@pytest.fixture(scope="module")
def folders(root: Path) -> dict[str, str]:
    return {folder.name: str(folder) for folder in root.iterdir()}


def python(code: str, *arguments: object, seed: str = "0") -> str:
    """What a fresh interpreter prints."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONHASHSEED": seed}, check=True, text=True, capture_output=True,
    )  # fmt: skip
    return run.stdout


# --- hash


def test_the_hash_is_the_same_in_any_process_and_any_place(tmp_path: Path, root: Path, folders: dict[str, str]) -> None:
    moved = shutil.copytree(root, tmp_path / "elsewhere" / "deeper")
    renamed = {name: str((moved / name).rename(moved / f"my-{name}")) for name in folders}
    fields: dict[str, Any] = {"exclude": ["text.layers.1.*", "*.bias"], "vocab": "overlap", "dtype": "float32"}
    recipes = [recipe_of(places, "dare_ties", ("vlm", "llm", "tied"), **fields) for places in (folders, renamed)]
    hashes = {polymerge.plan(recipe).hash for recipe in recipes}
    code = "import json, sys, polymerge; print(polymerge.plan(json.loads(sys.argv[1])).hash)"
    hashes |= {python(code, json.dumps(recipe), seed=seed).strip() for recipe, seed in zip(recipes, "12", strict=True)}
    assert len(hashes) == 1


def test_the_hash_sees_everything_that_changes_the_result(tmp_path: Path, folders: dict[str, str]) -> None:
    """Of any two of these merges the plans differ."""
    recipe = recipe_of(folders, "ties", ("vlm", "llm"), parameters={"density": 0.5})
    narrow = {"model.layers.1.mlp.up_proj.weight": ("BF16", (12, 8))}
    changed = {
        "dtype on disk": str(llm(tmp_path / "dtype", more=narrow)),
        "order on disk": str(llm(tmp_path / "order", dtype="F32", without=["lm_head.weight"],
                                 more={"lm_head.weight": ("F32", (16, 8))}, shards=2)),
        "rows": str(llm(tmp_path / "rows", dtype="F32", vocab=17)),
        "family": str(llm(tmp_path / "family", dtype="F32", kind="mistral")),
        "layers": str(llm(tmp_path / "layers", dtype="F32", layers=3)),
    }  # fmt: skip
    deeper = {"vlm": str(vlm(tmp_path / "deep", layers=3)), "llm": changed.pop("layers"),
              "base": str(llm(tmp_path / "base", layers=3))}  # fmt: skip
    layers_0 = [{"layers": 0, "parameters": {"density": 0.5}}, {"layers": 0, "merge_method": "copy"}]
    recipes = {
        "": recipe,
        "density": recipe | {"parameters": {"density": 0.25}},
        "scale": recipe | {"parameters": {"density": 0.5, "scale": 2}},
        "method": recipe | {"merge_method": "dare_ties"},
        "seed": recipe | {"seed": 1},
        "dtype": recipe | {"dtype": "float32"},
        "exclude": recipe | {"exclude": ["text.norm.weight"]},
        "vocab": recipe | {"vocab": "overlap"},
        "overrides": recipe | {"overrides": layers_0[1:]},
        "template": recipe | {"template": folders["tuned"]},
        "order": recipe | {"models": recipe["models"][::-1]},
        "weights": recipe | {"models": [recipe["models"][0], {**recipe["models"][1], "parameters": {"weight": 1}}]},
        "one more": recipe | {"models": [*recipe["models"], {"model": folders["tied"], "parameters": {"weight": 1}}]},
        "deeper": recipe_of(deeper, "ties", parameters={"density": 0.5}),
        **{what: recipe_of(folders | {"llm": place}, "ties", parameters={"density": 0.5})
           for what, place in changed.items()},
    }  # fmt: skip
    hashes = {what: polymerge.plan(wanted).hash for what, wanted in recipes.items()}
    assert len(set(hashes.values())) == len(hashes), hashes
    # and it does not see what does not
    same = [
        recipe | {"parameters": {"density": "0.5"}},
        recipe | {"parameters": {"density": 0.5, "int8_mask": True, "lambda": 1}},
        recipe | {"template": folders["vlm"], "parts": ["text"], "seed": 42},
        recipe | {"overrides": layers_0},
    ]
    assert {polymerge.plan(wanted).hash for wanted in same} == {hashes[""]}
    copied = recipe | {"overrides": [{"match": "text.norm.weight", "merge_method": "copy"}]}  # another reason, no more
    assert polymerge.plan(copied).hash == hashes["exclude"]


# --- text


def test_the_description_names_every_fate_and_every_input(tmp_path: Path, folders: dict[str, str]) -> None:
    template = str(vlm(tmp_path / "template", vocab=18))
    overrides = [
        {"layers": 0, "match": "*.mlp.*", "merge_method": "copy"},
        {"match": "*.k_proj.*", "parameters": {"density": 1}},
    ]
    recipe = recipe_of(folders | {"vlm": template}, "ties", vocab="overlap", exclude=["text.norm.weight"],
                       parameters={"density": 0.5}, overrides=overrides)  # fmt: skip
    plan = polymerge.plan(recipe)
    text, full = describe(plan), describe(plan, full=True)
    rest = "elect weighted; normalize weight; trim tensor; scale 1"
    k_proj = "model.layers.{i}.self_attn.k_proj.weight"
    for line in (
        "ties of 2 models",
        f"  template  template, model 0: family llava_next, 27 tensors, {human_size(plan.inputs[0].size)}, {template}",
        f"  base      base: family llama, 22 tensors, {human_size(plan.inputs[2].size)}, {folders['base']}",
        f"[0] ties (weight 0.5 template, 0.5 llm; density 1; {rest}): 2 tensors",
        f"[1] ties (weight 0.5 template, 0.5 llm; density 0.5; {rest}): 15 tensors",
        f"  language_model.{k_proj} [0] <- template; llm {k_proj}; base {k_proj}, i = 0-1",
        "  language_model.model.embed_tokens.weight [1] <- template; "
        "llm model.embed_tokens.weight[0:12]; base model.embed_tokens.weight (rows 12 to 18 are the template's; "
        "4 of the 16 rows of 'llm' are not read)",
        "  copied by the recipe (overrides[0]): 3 (language_model.model.layers.0.mlp.gate_proj.weight, "
        "language_model.model.layers.0.mlp.up_proj.weight, language_model.model.layers.0.mlp.down_proj.weight)",
        "  excluded by the recipe: 1 (language_model.model.norm.weight)",
        "  part projector is not merged: 3 (image_newline, multi_modal_projector.linear_1.bias, "
        "multi_modal_projector.linear_1.weight)",
        "  a buffer that is computed from the config, never merged: 1 "
        "(vision_tower.vision_model.embeddings.position_ids)",
        "left out of the inputs: 10 tensors",
        "  llm: the template's is kept: excluded by the recipe: 1 (model.norm.weight)",
        f"output: 27 tensors (17 merged, 10 copied), {human_size(plan.size)}",
        f"hash: {plan.hash}",
    ):
        assert line in text.split("\n"), line
    assert all(f"  {step.name}" in full for step in plan.steps)
    assert all(f"  {plan.inputs[entry.input].label}: {entry.name} ({entry.reason})" in full for entry in plan.left_out)
    assert all(f"note: {warning}" in text for warning in plan.warnings)


def test_a_description_has_a_line_for_each_kind_of_tensor_and_not_for_each(tmp_path: Path) -> None:
    lengths = set()
    for layers in (3, 30):
        models = [vlm(tmp_path / f"vlm{layers}", layers=layers), llm(tmp_path / f"llm{layers}", layers=layers)]
        recipe = {
            "merge_method": "linear",
            "models": [{"model": str(one), "parameters": {"weight": 1}} for one in models],
        }
        lengths.add(len(describe(polymerge.plan(recipe)).split("\n")))
    assert len(lengths) == 1


def test_many_names_with_one_reason_are_said_by_what_they_begin_with(folders: dict[str, str]) -> None:
    recipe = recipe_of(folders, "linear", exclude=["text.layers.*.mlp.*"])
    assert "  excluded by the recipe: 6 (language_model.model.*)" in describe(polymerge.plan(recipe)).split("\n")
    recipe = recipe_of(
        folders, "linear", ("vlm", "tuned"), exclude=["text.lm_head.*", "projector.*", "vision.*", "*norm.*"]
    )
    lines = describe(polymerge.plan(recipe)).split("\n")
    assert "  excluded by the recipe: 11 (image_newline, ...)" in lines


def test_expressions_are_written_as_people_write_them() -> None:
    q, k, v = map(Read, "qkv")
    assert expression(Concat((q, Rows(k, 0, 4), v))) == "cat(q, k[0:4], v)"
    assert expression(Rows(Concat((q, k)), 4, 8)) == "cat(q, k)[4:8]"


# --- what planning loads

LOADED = """
import sys
from unittest.mock import patch
with patch.object(sys, "argv", ["polymerge", *sys.argv[1:]]):
    try:
        from polymerge.cli import main
        main()
    except SystemExit as end:
        print("exit", end.code)
print("loaded", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize("words", [["--help"], ["methods"], ["plan", "RECIPE"], ["inspect", "VLM", "LLM"]],
                         ids=lambda words: words[0])  # fmt: skip
def test_neither_help_nor_plans_load_what_computes(tmp_path: Path, folders: dict[str, str], words: list[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe_of(folders, "ties")), encoding="utf-8")
    places = {"RECIPE": tmp_path / "recipe.yaml", "VLM": folders["vlm"], "LLM": folders["llm"]}
    out = python(LOADED, *(places.get(word, word) for word in words))
    assert "exit 0" in out.split("\n")
    loaded = out.split("\nloaded ")[1].split()
    assert {"polymerge", "click"} <= set(loaded)
    assert not {"torch", "transformers", "numba", "safetensors", "huggingface_hub", "numpy"} & set(loaded)


# --- real sizes


def test_an_8b_model_is_planned_from_its_headers(tmp_path: Path) -> None:
    llama: dict[str, Any] = {"layers": 32, "width": 4096, "inner": 14336, "keys": 1024, "shards": 4}
    template = vlm(tmp_path / "vlm", vocab=128320, dtype="F16", seen=1024, **llama)
    others = [llm(tmp_path / name, vocab=128256, **llama) for name in ("llm", "base")]
    recipe = {
        "merge_method": "ties", "base_model": str(others[1]), "parameters": {"density": 0.2},
        "models": [{"model": str(model), "parameters": {"weight": 0.5}} for model in (template, others[0])],
    }  # fmt: skip
    plan = polymerge.plan(recipe)
    assert plan.counts() == {"merged": 289, "copied": 8, "folded": 0, "dequantized": 0, "tied": 0}
    assert 16e9 < plan.size < 17e9
    assert {entry.size for entry in plan.inputs} > {16_060_522_496 + 4 * 2048}
    assert len([warning for warning in plan.warnings if "vocabularies differ" in warning]) == 1
    assert sum(file.stat().st_blocks * 512 for file in tmp_path.rglob("*") if file.is_file()) < 10e6


def test_the_notes_of_all_stages_come_first(tmp_path: Path) -> None:
    one, other = (vlm(tmp_path / name, vocab=rows) for name, rows in (("one", 16), ("other", 20)))
    stages = [{**linear(one, other), "name": "first"}, linear("first", other)]
    plan = polymerge.plan({"stages": stages})
    notes = [f"note: stage 'first': {text}" for text in plan.stages[0].warnings]
    notes += [f"note: {text}" for text in plan.warnings]
    assert plan.stages[0].warnings
    lines = describe(plan).split("\n")
    assert lines[: len(notes) + 2] == [*notes, "", "--- stage first"]
    assert not any(line.startswith("note:") for line in lines[len(notes) :])
