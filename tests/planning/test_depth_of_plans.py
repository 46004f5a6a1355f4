"""Plans of recipes whose numbers change by depth: which tensor gets which setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapters_made import PEFT_WARNINGS, adapter, llama
from headers_only import llm, vlm
from polymerge.errors import Refused
from polymerge.families.rules import text_layer
from polymerge.planning import Plan, make_plan
from polymerge.planning.text import describe

pytestmark = PEFT_WARNINGS


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("depth")
    llm(folder / "one", layers=4)
    llm(folder / "two", layers=4)
    vlm(folder / "vlm", layers=4)
    return folder


def planned(place: Path, method: str, models: dict[str, Any], parameters: Any = None, **more: Any) -> Plan:
    entries = [{"model": str(place / name), "parameters": own} for name, own in models.items()]
    return make_plan({"merge_method": method, "models": entries, "parameters": parameters, **more})


def said(plan: Plan, name: str, of: str) -> Any:
    """A parameter of the only setting of a stored tensor."""
    (piece,) = next(step for step in plan.steps if step.name == name).pieces
    assert piece.setting is not None
    return plan.settings[piece.setting].parameters[of]


def test_each_layer_has_its_own_setting_and_the_rest_the_first(place: Path) -> None:
    plan = planned(place, "slerp", {"one": None, "two": None}, {"t": [0, 1]})
    assert [said(plan, f"model.layers.{layer}.mlp.up_proj.weight", "t") for layer in range(4)] == [0, 1 / 3, 2 / 3, 1]
    outside = ("model.norm.weight", "lm_head.weight", "model.embed_tokens.weight")
    assert {said(plan, name, "t") for name in outside} == {0}
    assert len(plan.settings) == 4


def test_equal_numbers_share_a_setting(place: Path) -> None:
    plan = planned(place, "linear", {"one": {"weight": [0.5, 0.5]}, "two": {"weight": 1}})
    assert len(plan.settings) == 1
    plan = planned(
        place, "linear", {"one": {"weight": [{"filter": "mlp", "value": 2}, {"value": 1}]}, "two": {"weight": 1}}
    )
    assert [setting.parameters["weight"] for setting in plan.settings] == [(1, 1), (2, 1)]


def test_a_filter_is_part_of_the_template_s_own_names(place: Path) -> None:
    models = {"vlm": {"weight": [{"filter": "language_model", "value": 3}, {"value": 1}]}, "one": {"weight": 1}}
    assert {setting.parameters["weight"] for setting in planned(place, "linear", models).settings} == {(3, 1)}
    models["vlm"]["weight"][0]["filter"] = "text.layers"
    plan = planned(place, "linear", models)
    assert {setting.parameters["weight"] for setting in plan.settings} == {(1, 1)}
    (told,) = [one for one in plan.warnings if "filter" in one]
    assert told.startswith("filter 'text.layers' is part of no tensor's name in template 'vlm', such as ")


def test_other_towers_take_the_first_value(place: Path, tmp_path: Path) -> None:
    vlm(tmp_path / "tuned", layers=4)
    models = {str(place / "vlm"): {"weight": [0.5, 1]}, str(tmp_path / "tuned"): {"weight": 1}}
    plan = planned(place, "linear", models)
    weights = {piece.canonical: setting.parameters["weight"][0] for _, piece, setting in plan.merged_pieces()}
    assert {weights[name] for name in weights if not name.startswith("text.layers.")} == {0.5}
    assert {text_layer(name): weights[name] for name in weights}[3] == 1


def test_layers_are_counted_in_the_config_not_in_what_is_stored(tmp_path: Path) -> None:
    for name in ("one", "two"):
        llm(tmp_path / name, layers=5, config={"num_hidden_layers": 4})
    plan = planned(tmp_path, "slerp", {"one": None, "two": None}, {"t": [0, 1]})
    assert [said(plan, f"model.layers.{layer}.mlp.up_proj.weight", "t") for layer in (3, 4)] == [1, 1]


def test_the_plan_says_what_a_gradient_became(place: Path) -> None:
    text = describe(planned(place, "slerp", {"one": None, "two": None}, {"t": [0, 0.5, 1]}))
    assert "[1] slerp (t 0.333333): 9 tensors, in layer 1\n" in text
    assert "[0] slerp (t 0): 12 tensors\n" in text
    (line,) = [line for line in text.splitlines() if "mlp.up_proj" in line]
    name = "model.layers.{i}.mlp.up_proj.weight"
    assert line == f"  {name} [0-3] <- one; two {name}, i = 0-3"


def test_many_settings_are_told_as_ranges(tmp_path: Path) -> None:
    for name in ("one", "two"):
        llm(tmp_path / name, layers=16)
    by_filter = [{"filter": "mlp", "value": [0, 1]}, {"value": [3, 4]}]
    plan = planned(tmp_path, "linear", {"one": {"weight": by_filter}, "two": {"weight": 1}})
    text = describe(plan)
    line = "[0-31] linear (weight 0 to 4 one, 1 two; normalize true): 147 tensors, 32 settings by layer or name"
    assert line in text.split("\n")
    assert "  model.layers.{i}.mlp.up_proj.weight [16 settings] <- one; two " in text
    lines = describe(plan, full=True).split("\n")
    assert "[30] linear (weight 4 one, 1 two; normalize true): 6 tensors, in layer 15" in lines


def test_adapters_change_by_depth_too(tmp_path: Path) -> None:
    one, two = (str(adapter(tmp_path / name, target_modules=["q_proj", "v_proj"])) for name in ("one", "two"))
    llama().save_pretrained(tmp_path / "base")
    by_filter = [{"filter": "q_proj", "value": [0, 1]}, {"value": 2}]
    models = {one: {"weight": by_filter}, two: {"weight": 1}}
    plan = planned(tmp_path, "task_arithmetic", models, base_model=str(tmp_path / "base"))
    weights = {step.canonical: setting.parameters["weight"] for step, _, setting in plan.merged_pieces()}
    for layer in (0, 1):
        assert weights[f"text.layers.{layer}.self_attn.q_proj"] == (layer, 1)
        assert weights[f"text.layers.{layer}.self_attn.v_proj"] == (2, 1)
    with pytest.raises(Refused, match="numbers that change from layer to layer, and the names"):
        planned(tmp_path, "task_arithmetic", models)
