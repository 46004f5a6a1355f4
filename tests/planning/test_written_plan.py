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
from running import cli, linear, merged, recipe_file, two_llamas, weights

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
        ({"version": 0}, "has format 0, this polymerge reads 5: plan again"),
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


def test_a_recipe_in_json_is_a_recipe(tmp_path: Path) -> None:
    recipe = linear(*two_llamas(tmp_path))
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert polymerge.plan(tmp_path / "recipe.json") == polymerge.plan(recipe)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(polymerge.PolymergeError, match="recipe"):
        polymerge.plan(tmp_path / "broken.json")
