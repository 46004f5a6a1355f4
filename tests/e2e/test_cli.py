"""The command line: what it exits with, what it prints and where."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml

import tiny_derived
from polymerge.families import FAMILIES
from polymerge.methods.table import METHODS
from running import Ran, checkpoint, cli, leftovers, linear, merged, raw, recipe_file, small_llama, two_llamas


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    return two_llamas(tmp_path)


@pytest.fixture
def asked(models: tuple[Path, Path], tmp_path: Path) -> Path:
    return recipe_file(linear(*models), tmp_path / "recipe.yaml")


def only_error(ran: Ran, status: int) -> str:
    """The message of a command that failed: on standard error alone, and no traceback."""
    assert ran.status == status, ran
    assert ran.out == ""
    assert "Traceback" not in ran.err
    return ran.err


# --- exit status


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--version"], ["merge", "--help"], ["plan", "-h"]])
def test_help_is_no_error(words: list[str]) -> None:
    ran = cli(*words)
    assert (ran.status, ran.err) == (0, "")
    assert "polymerge" in ran.out.lower()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["merg"], "No such command 'merg'"),
        (["merge", "--no-such"], "No such option"),
        (["merge", "r.yaml", "--threads", "0"], "--threads"),
        (["merge", "r.yaml", "--format", "gguf"], "gguf"),
        (["merge"], "say what to merge: a recipe file, or --template"),
        (["plan", "--template", "a", "--with", "b"], "without a recipe file it needs --method NAME, too"),
        (["plan", "--method", "linear"], "it needs --template MODEL and --with MODEL, too"),
        (["inspect"], "MODEL"),
    ],
)
def test_a_wrong_command_line_is_2(words: list[str], said: str) -> None:
    assert said in only_error(cli(*words), 2)


def test_python_m_polymerge_is_polymerge(models: tuple[Path, Path], tmp_path: Path) -> None:
    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "polymerge", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    for words in (["--help"], ["--version"], ["merge", "--help"], ["merg"], ["plan", tmp_path / "none.yaml"]):
        by_module, by_script = run(*words), cli(*words)
        assert (by_module.returncode, by_module.stdout, by_module.stderr) == (
            by_script.status, by_script.out, by_script.err,
        )  # fmt: skip
    assert "Usage: polymerge merge [OPTIONS]" in run("merge", "--help").stdout
    assert run("merg").returncode == 2
    recipe = recipe_file(linear(*models), tmp_path / "r.yaml")
    assert run("merge", recipe, "-o", tmp_path / "out", "--no-verify").returncode == 0
    by_script = merged(linear(*models), tmp_path / "out2", "--no-verify")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (by_script / "model.safetensors").read_bytes()
    record = json.loads((tmp_path / "out" / "polymerge.json").read_text(encoding="utf-8"))
    assert record["command"][:2] == ["polymerge", "merge"]


def test_every_problem_of_a_recipe_is_listed_at_once(models: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = {
        "merge_method": "tiez",
        "models": [{"model": str(models[0]), "parameters": {"weigth": 1}}, {"model": str(tmp_path / "othr")}],
        "slices": [],
        "dtype": "int8",
        "vocab": "by-name",
        "parts": ["txt"],
        "seed": -1,
    }
    said = only_error(cli("plan", recipe_file(recipe, tmp_path / "r.yaml")), 2)
    for problem in ("'tiez'", "Did you mean 'ties'", "'weigth'", "'weight'", "Did you mean 'other'", "slices", "'int8'",
                    "by-name", "'txt'", "'text'", "'-1'"):  # fmt: skip
        assert problem in said
    assert "problems, nothing was written:" in said
    assert all(f"  {number}. " in said for number in range(1, 8))


def test_a_recipe_that_is_not_there_or_no_yaml(asked: Path, tmp_path: Path) -> None:
    assert "Did you mean 'recipe.yaml'" in only_error(cli("plan", tmp_path / "recipes.yaml"), 2)
    asked.write_text("merge_method: [")
    assert "invalid YAML" in only_error(cli("plan", asked), 2)
    asked.write_text("- just\n- a list\n")
    assert "a recipe has to be a mapping" in only_error(cli("plan", asked), 2)


def test_a_broken_file_is_1(asked: Path, models: tuple[Path, Path]) -> None:
    file = models[1] / "model.safetensors"
    file.write_bytes(b"\xff" * 100)
    assert str(file) in only_error(cli("plan", asked), 1)


def test_a_wrong_path_gets_a_suggestion(tmp_path: Path) -> None:
    two_llamas(tmp_path)
    for wrong in (tmp_path / "oter", tmp_path / "otherr"):
        said = only_error(cli("inspect", wrong), 2)
        assert f"{wrong}: there is no such file or folder. Did you mean 'other'?" in said
    said = only_error(cli("inspect", tmp_path / "no/such/model"), 2)
    assert f"'{tmp_path}' exists, but has no 'no'" in said


def test_a_file_of_json_replaces_nothing_else(asked: Path, tmp_path: Path) -> None:
    recipe = asked.read_bytes()
    for command in ("plan", "overlap"):
        said = only_error(cli(command, asked, "--json", tmp_path / "no/plan.json"), 2)
        assert f"there is no folder {tmp_path / 'no'}. Make it first" in said
        assert "is a folder. Name a file" in only_error(cli(command, asked, "--json", tmp_path), 2)
        assert f"{asked}: exists and is no JSON file" in only_error(cli(command, asked, "--json", asked), 2)
    assert asked.read_bytes() == recipe
    for _ in range(2):
        assert cli("plan", asked, "--json", tmp_path / "plan.json").status == 0


# --- plan and merge


def test_flags_say_the_same_as_a_recipe(models: tuple[Path, Path], tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", small_llama(0))
    words = f"""--template {models[0]} --with {models[1]} --base {base} --method ties --weight 0.9,0.2 -p density=0.4
        -p elect=unweighted --exclude text.norm.* --seed 3 --parts text --dtype float32 --vocab overlap --no-verify"""
    assert cli("merge", *words.split(), "-o", tmp_path / "flags").status == 0
    recipe = {
        "merge_method": "ties",
        "template": str(models[0]),
        "base_model": str(base),
        "models": [
            {"model": str(model), "parameters": {"weight": weight}}
            for model, weight in zip(models, (0.9, 0.2), strict=True)
        ],
        "parameters": {"density": 0.4, "elect": "unweighted"},
        "exclude": ["text.norm.*"],
        "seed": 3,
        "parts": ["text"],
        "dtype": "float32",
        "vocab": "overlap",
    }
    assert raw(tmp_path / "flags") == raw(merged(recipe, tmp_path / "file", "--no-verify"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--weight", "0.9"], "--weight: 1 numbers for 2 models"),
        (["--weight", "a,b"], "'--weight': 'a,b' is not a list of numbers"),
        (["-p", "density"], "'--parameter': 'density' is not NAME=VALUE"),
        (["--method", "tiez"], "Did you mean 'ties'"),
    ],
)
def test_flags_that_cannot_be_read(words: list[str], said: str, models: tuple[Path, Path]) -> None:
    given = ["--template", models[0], "--with", models[1]]
    given += [] if "--method" in words else ["--method", "linear"]
    assert said in only_error(cli("plan", *given, *words), 2)


def test_a_recipe_and_flags_together_are_refused(asked: Path, models: tuple[Path, Path]) -> None:
    assert "a recipe file and --with together" in only_error(cli("plan", asked, "--with", models[1]), 2)


def test_an_output_has_to_be_named(asked: Path) -> None:
    assert "Missing option '-o'" in only_error(cli("merge", asked), 2)


def test_a_dry_run_plans_and_writes_nothing(asked: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    plain = cli("merge", asked, "--dry-run")
    assert (plain.status, plain.err) == (0, "")
    assert plain.out == cli("plan", asked).out
    assert cli("merge", asked, "-o", tmp_path / "out", "--dry-run").out == plain.out
    assert json.loads(cli("merge", asked, "--dry-run", "--json").out)["steps"]
    assert sorted(tmp_path.iterdir()) == before


def test_plan_says_each_kind_of_tensor_and_with_full_each_tensor(asked: Path) -> None:
    said = cli("plan", asked).out
    assert "linear of 2 models" in said
    assert "model.layers.{i}.mlp.up_proj.weight [0] <- one; other" in said
    assert "i = 0-1" in said
    full = cli("plan", asked, "--full").out
    assert all(name in full for name in small_llama(0))


def test_a_plan_as_json_is_the_whole_plan(asked: Path, tmp_path: Path) -> None:
    ran = cli("plan", asked, "--json", tmp_path / "plan.json")
    assert "linear of 2 models" in ran.out
    written = json.loads((tmp_path / "plan.json").read_text())
    ran = cli("plan", asked, "--json", "-")
    assert ran.err == ""
    assert json.loads(ran.out) == written
    assert {step["name"] for step in written["steps"]} == set(small_llama(0))
    assert written["hash"] in cli("plan", asked).out


def test_merge_reports_on_standard_output_and_notes_on_standard_error(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    base = checkpoint(tmp_path / "base", small_llama(3))
    entries = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
    asked = recipe_file({"merge_method": "linear", "models": entries, "base_model": str(base)}, tmp_path / "r.yaml")
    ran = cli("merge", asked, "-o", tmp_path / "out", "--no-verify")
    assert ran.out.splitlines() == [
        f"{tmp_path / 'out'}: 5 tensors merged, 0 copied, 396 B",
        "  not verified (--no-verify)",
    ]
    assert ran.err == "note: base_model 'base' is not read: linear needs none\n"
    ran = cli("merge", asked, "-o", tmp_path / "json", "--no-verify", "--json")
    report = json.loads(ran.out)
    assert report["out"] == str(tmp_path / "json")
    assert report["tensors"] == {"merged": 5, "copied": 0, "folded": 0, "dequantized": 0, "tied": 0}
    assert report["plan_hash"] == json.loads((tmp_path / "json/polymerge.json").read_text())["plan_hash"]


def test_progress_is_plain_lines_where_there_is_no_terminal(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("merge", asked, "-o", tmp_path / "quick", "--no-verify").err == ""
    monkeypatch.setattr("polymerge.cli.progress._SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("polymerge.engine.pool.ERRAND", 1)  # tensors as small as these go to a thread together, else
    said = cli("merge", asked, "-o", tmp_path / "out", "--no-verify", "--json")
    assert json.loads(said.out)
    lines = said.err.splitlines()
    assert len(lines) == 4
    line = re.compile(r"merging: \d+ B of 396 B, \d+(\.\d)? [kMG]?B/s, about \d+(\.\d)? s left")
    assert all(map(line.fullmatch, lines)), lines


@pytest.mark.parametrize(("words", "said"), [(["--shard-size", "5XB"], "5XB"), (["--device", "cuda:99"], "cuda:99")])
def test_merge_options_that_cannot_be_met(words: list[str], said: str, asked: Path, tmp_path: Path) -> None:
    assert said in only_error(cli("merge", asked, "-o", tmp_path / "out", *words), 2)
    assert leftovers(tmp_path) == []


# --- looking


def test_inspect_shows_models_and_what_merges_with_what(models: tuple[Path, Path], tmp_path: Path) -> None:
    vlm = {f"language_model.{name}": tensor for name, tensor in small_llama(1).items()}
    vlm["multi_modal_projector.linear_1.weight"] = small_llama(1)["lm_head.weight"]
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {}}
    folder = checkpoint(tmp_path / "vlm", vlm, config)
    said = cli("inspect", folder, models[0]).out
    assert "vlm: family llava, 6 tensors" in said
    assert "projector: 1 tensors" in said
    assert "one can be merged into vlm in text (5 tensors)" in said
    report = json.loads(cli("inspect", folder, models[0], "--json").out)
    assert [model["family"] for model in report["models"]] == ["llava", "llama"]
    assert report["models"][0]["layers"] == 2
    assert [(pair["template"], pair["other"], pair["joined"]) for pair in report["pairs"]] == [
        ("vlm", "one", 5),
        ("one", "vlm", 5),
    ]


def test_inspect_says_why_two_do_not_fit(models: tuple[Path, Path], tmp_path: Path) -> None:
    deep = small_llama(1)
    deep["model.layers.2.mlp.up_proj.weight"] = deep["model.layers.0.mlp.up_proj.weight"].clone()
    said = cli("inspect", models[0], checkpoint(tmp_path / "deep", deep)).out
    assert "deep cannot be merged into one" in said
    assert "'deep' has 3 text layers, template 'one' has 2" in said


def test_methods_and_families_list_the_tables() -> None:
    said = cli("methods").out
    assert all(f"{name}: {row.title}" in said for name, row in METHODS.items())
    assert "density: 0 to 1, default 1.0, per model" in said
    report = json.loads(cli("methods", "--json").out)
    assert list(report) == list(METHODS)
    assert [parameter["name"] for parameter in report["slerp"]["parameters"]] == ["t"]
    said = cli("families").out
    assert all(f"{name}: " in said for name in FAMILIES)
    assert list(json.loads(cli("families", "--json").out)) == list(FAMILIES)


def test_families_says_which_way_a_model_is_read(models: tuple[Path, Path], tmp_path: Path) -> None:
    said = cli("families", models[0]).out
    assert said.startswith(
        "one: table of family llama (Llama)\n  model.embed_tokens.weight -> text.embed_tokens.weight"
    )
    derived = tiny_derived.build(tiny_derived.tiny_config("qwen3_5_text"), tmp_path / "derived")
    strange = checkpoint(tmp_path / "strange", {"a": torch.ones(2)}, {"model_type": "strange"})
    said = cli("families", derived, strange).out
    assert said.startswith(f"derived: derived from transformers {transformers.__version__}'s Qwen3_5ForCausalLM, which")
    assert "QWEN3_5_TEXT = Family(\n" in said
    assert "strange: generic: no table covers it" in said
    report = json.loads(cli("families", derived, "--json").out)["derived"]
    assert report["derived from"] == f"transformers {transformers.__version__}'s Qwen3_5ForCausalLM"
    assert report["family"]["architectures"] == ["Qwen3_5ForCausalLM"]
    assert cli("families", tmp_path / "gone").status == 2


def test_a_recipe_can_be_in_yaml_of_any_style(models: tuple[Path, Path], tmp_path: Path) -> None:
    flow = tmp_path / "flow.yaml"
    flow.write_text(yaml.safe_dump(linear(*models), default_flow_style=True))
    block = recipe_file(linear(*models), tmp_path / "block.yaml")
    assert cli("plan", flow).out == cli("plan", block).out
