"""Plans that were written as JSON: `merge PLAN.json` does what was planned, and nothing else."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

import polymerge
from adapters_made import PEFT_WARNINGS, adapter
from adapters_made import recipe as adapter_recipe
from polymerge.errors import PolymergeError
from polymerge.methods.table import METHODS
from running import checkpoint, cli, linear, merged, recipe_file, small_llama, two_llamas, weights

pytestmark = PEFT_WARNINGS


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The plan of a merge of two checkpoints, as `polymerge plan --json` writes it."""
    recipe = recipe_file(linear(*two_llamas(tmp_path)), tmp_path / "recipe.yaml")
    assert cli("plan", recipe, "--json", tmp_path / "plan.json").status == 0
    return tmp_path / "plan.json"


def test_a_written_plan_is_merged(written: Path) -> None:
    folder = written.parent
    ran = cli("merge", written, "-o", folder / "out", "--no-verify")
    assert ran.status == 0, ran.err
    expected = merged(linear(folder / "one", folder / "other"), folder / "expected", "--no-verify")
    assert weights(folder / "out") == weights(expected)
    assert cli("plan", written).out == cli("plan", folder / "recipe.yaml").out


def test_a_written_plan_of_adapters_is_merged(tmp_path: Path) -> None:
    adapters = [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2, r=4, modules_to_save=["lm_head"])]
    recipe = recipe_file(adapter_recipe("ties", adapters, 0.5), tmp_path / "recipe.yaml")
    assert cli("plan", recipe, "--json", tmp_path / "plan.json").status == 0
    for name, source in (("one", recipe), ("other", tmp_path / "plan.json")):
        ran = cli("merge", source, "-o", tmp_path / name, "--no-verify")
        assert ran.status == 0, ran.err
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "other")]
    assert files[0] == files[1]


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.takes_base])
@pytest.mark.parametrize("on_base", [False, True])
def test_a_written_plan_knows_whether_methods_with_and_without_a_base_have_one(
    on_base: bool, method: str, tmp_path: Path
) -> None:
    one, other = map(str, two_llamas(tmp_path))
    base = {"base_model": str(checkpoint(tmp_path / "base", small_llama(5)))} if on_base else {}
    recipe = {"merge_method": method, "models": [one, other], "parameters": {"weight": 0.5}, **base}
    plan = polymerge.plan(recipe)
    there = polymerge.plan(json.loads(json.dumps(plan.to_json())))
    assert there == plan
    assert [one.on_deltas for one in there.settings] == [one.on_deltas for one in plan.settings] == [on_base]
    found = polymerge.merge(there, tmp_path / "out", check=False).folder
    assert weights(found) == weights(polymerge.merge(recipe, tmp_path / "same", check=False).folder)
    data = json.loads(json.dumps(plan.to_json()))
    data["recipe"]["base_model"] = None if on_base else one
    with pytest.raises(PolymergeError, match=f"{method} and a base do not fit"):
        polymerge.plan(data)


def test_what_another_process_is_given_opens_its_inputs_itself(written: Path) -> None:
    plan = polymerge.plan(str(written.parent / "recipe.yaml"))
    there = pickle.loads(pickle.dumps(plan))
    assert there == plan
    assert all(entry.opened is not None for entry in plan.inputs)
    assert all(entry.opened is None for entry in there.inputs)
    out = polymerge.merge(there, written.parent / "out", check=False).folder
    assert weights(out) == weights(polymerge.merge(plan, written.parent / "other out", check=False).folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 0}, "has format 0, this polymerge reads 7: plan again"),
        ({"seed": 7}, "was modified: its hash is"),
        ({"steps": [{"name": "weight"}]}, "is not a valid plan"),
        (
            {"companions": [{"kind": "", "folder": "/", "files": ["../../x"], "dropped": [], "why": ""}]},
            "a plan cannot name files outside of its folders: '../../x'",
        ),
    ],
    ids=["version", "changed", "broken", "outside"],
)
def test_what_is_not_a_plan_as_it_was_written_is_refused(change: dict[str, Any], said: str, written: Path) -> None:
    written.write_text(json.dumps(json.loads(written.read_text()) | change))
    with pytest.raises(PolymergeError, match=said):
        polymerge.plan(written)
    ran = cli("merge", written, "-o", written.parent / "out")
    assert ran.status == 2
    assert said.partition(" (")[0] in ran.err
    assert not (written.parent / "out").exists()


ODD: list[tuple[str, Any]] = [
    ("template", 7), ("template", "0"), ("models", [0, 5]), ("places", [0]), ("base", 9), ("seed", -1), ("recipe", {}),
    ("beside", {"config": None}), ("settings", []), ("settings.0.method", "none"), ("settings.0.parameters", {}),
    ("settings.0.parameters.weight", [0.5]), ("settings.0.parameters.weight", 0.5), ("inputs.0", 3),
    ("inputs.0.path", 1.5), ("inputs.0.opened", {}), ("left_out", [{"input": 3, "name": "x", "reason": ""}]),
    ("steps.0.shape", [-1, 2]), ("steps.0.shape", [[]]), ("steps.0.dtype", ["BF16"]), ("steps.0.dtype", "F4x"),
    ("steps.0.fate", "tied"), ("steps.0.fate", "copied"), ("steps.0.pieces", 5), ("steps.0.lora", 2),
    ("steps.0.pieces.0.rows", [[0, 1]]), ("steps.0.pieces.0.reads", ["x"]), ("steps.0.pieces.0.setting", 4),
    ("steps.0.pieces.0.inputs", [0, 8]), ("steps.0.pieces.0.base", "x"), ("steps.0.name", "model.norm.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("member", "value"), ODD)
def test_a_plan_whose_members_mean_nothing_is_refused(member: str, value: Any, written: Path) -> None:
    data = json.loads(written.read_text())
    del data["hash"]
    *path, last = [int(key) if key.isdigit() else key for key in member.split(".")]
    holder = data
    for key in path:
        holder = holder[key]
    holder[last] = value
    with pytest.raises(PolymergeError, match="is not a valid plan"):
        polymerge.plan(data)


@pytest.mark.parametrize(
    ("read", "said"),
    [("absent", "there is no such tensor"), ({"rows": [3, 90], "of": "lm_head.weight"}, "no rows 3 to 90"),
     ("model.norm.weight", "elements are wanted")],
)  # fmt: skip
def test_what_a_plan_reads_has_to_be_there(read: Any, said: str, written: Path) -> None:
    data = json.loads(written.read_text())
    del data["hash"]
    (step,) = (step for step in data["steps"] if step["name"] == "lm_head.weight")
    step["pieces"][0]["reads"][1] = read
    with pytest.raises(PolymergeError, match=f"step 'lm_head.weight' of the plan does not fit its inputs: .*{said}"):
        polymerge.merge(data, written.parent / "out", check=False)
    assert not (written.parent / "out").exists()


def test_a_recipe_in_json_is_a_recipe(tmp_path: Path) -> None:
    recipe = linear(*two_llamas(tmp_path))
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert polymerge.plan(tmp_path / "recipe.json") == polymerge.plan(recipe)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(polymerge.PolymergeError, match="recipe"):
        polymerge.plan(tmp_path / "broken.json")
