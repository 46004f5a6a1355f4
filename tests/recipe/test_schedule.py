"""Settings whose numbers change by depth: who is heard where, and what is refused once."""

from __future__ import annotations

from typing import Any

import pytest

from polymerge.errors import Refused, collecting
from polymerge.recipe.overrides import Choice, choices_of
from polymerge.recipe.parsing import parse_recipe

LABELS = ("one", "two")
DEPTH = 5


def chosen(method: str, general: Any = None, one: Any = None, two: Any = None, *overrides: Any) -> list[Choice]:
    models = [{"model": "one", "parameters": one}, {"model": "two", "parameters": two}]
    said = {"merge_method": method, "models": models, "parameters": general, "overrides": list(overrides)}
    with collecting():
        read = parse_recipe(said | ({"base_model": "base"} if method != "linear" else {}))
        return choices_of(read, LABELS, read.models)
    raise AssertionError


def at(choices: list[Choice], layer: int | None, rest: str = "mlp.up_proj.weight") -> Any:
    """The parameters of a tensor, the first choice that covers it deciding."""
    canonical = f"text.{rest}" if layer is None else f"text.layers.{layer}.{rest}"
    choice = next(choice for choice in choices if choice.covers(canonical))
    return choice.at(canonical, canonical.replace("text.", "model."), DEPTH).parameters


def test_a_gradient_goes_over_the_layers_and_begins_outside_of_them() -> None:
    choices = chosen("task_arithmetic", {"scale": [1, 2]}, {"weight": [0, 0.5, 1]}, {"weight": 0.25})
    assert [at(choices, layer)["weight"] for layer in range(DEPTH)] == [
        (0, 0.25), (0.25, 0.25), (0.5, 0.25), (0.75, 0.25), (1, 0.25),
    ]  # fmt: skip
    assert [at(choices, layer)["scale"] for layer in range(DEPTH)] == [1, 1.25, 1.5, 1.75, 2]
    assert (at(choices, None)["weight"], at(choices, None)["scale"]) == ((0, 0.25), 1)
    assert choices[-1].setting.parameters == at(choices, None)


def test_what_has_no_value_by_a_filter_has_the_recipe_s_or_the_default() -> None:
    own = {"density": {"filter": "mlp", "value": 0.5}, "weight": 1}
    choices = chosen("ties", {"density": {"filter": "norm", "value": 0.1}, "weight": 2}, own)
    assert at(choices, 2)["density"] == (0.5, 1.0)
    assert at(choices, 2, "input_layernorm.weight")["density"] == (0.1, 0.1)
    assert at(choices, 2, "self_attn.q_proj.weight")["density"] == (1.0, 1.0)


def test_flags_and_words_may_depend_on_a_filter() -> None:
    choices = chosen("ties", {"normalize": [{"filter": "mlp", "value": False}, {"value": True}], "weight": 1})
    assert (at(choices, 0)["normalize"], at(choices, 0, "norm.weight")["normalize"]) == ("none", "weight")


def test_an_override_s_gradient_goes_over_its_own_layers() -> None:
    said = {"layers": "1-3", "parameters": {"scale": [1, 3], "weight": [[0, 1], 0.5]}}
    choices = chosen("task_arithmetic", {"weight": [4, 8]}, None, None, said)
    assert [at(choices, layer)["scale"] for layer in range(DEPTH)] == [1, 1, 2, 3, 1]
    assert [at(choices, layer)["weight"] for layer in range(DEPTH)] == [
        (4, 4), (0, 0.5), (0.5, 0.5), (1, 0.5), (8, 8),
    ]  # fmt: skip


def test_a_list_in_an_override_is_one_value_per_model_and_a_condition_is_for_all() -> None:
    choices = chosen("linear", None, {"weight": 7}, {"weight": 7}, {"match": "*", "parameters": {"weight": [1, 2]}})
    assert at(choices, 2)["weight"] == (1, 2)
    both = {"match": "*", "parameters": {"weight": {"value": [1, 2]}}}
    assert at(chosen("linear", None, {"weight": 7}, {"weight": 7}, both), 2)["weight"] == (1.5, 1.5)
    some = {"match": "*", "parameters": {"weight": [1, {"filter": "norm", "value": 2}]}}
    with pytest.raises(Refused, match="mixes plain values and conditions"):
        chosen("linear", None, {"weight": 7}, {"weight": 7}, some)
    some["parameters"] = {"weight": [1, [{"filter": "norm", "value": 2}]]}
    assert at(chosen("linear", None, {"weight": 7}, {"weight": 7}, some), 2)["weight"] == (1, 7)


def test_the_position_between_two_models_may_change_and_so_may_their_weights() -> None:
    assert [at(chosen("slerp", {"t": [0, 1]}), layer)["t"] for layer in range(DEPTH)] == [0, 0.25, 0.5, 0.75, 1]
    choices = chosen("slerp", None, {"weight": [1, 0]}, {"weight": [0, 1]})
    assert [at(choices, layer)["t"] for layer in range(DEPTH)] == [0, 0.25, 0.5, 0.75, 1]
    choices = chosen("slerp", {"t": 0.5}, None, None, {"layers": "0-2", "parameters": {"weight": [[1, 0], [0, 1]]}})
    assert [at(choices, layer)["t"] for layer in range(DEPTH)] == [0, 0.5, 1, 0.5, 0.5]


def all_layers(choices: list[Choice]) -> None:
    with collecting():
        for layer in range(DEPTH):
            at(choices, layer)


def test_what_is_wrong_between_two_numbers_is_said_once() -> None:
    choices = chosen("linear", None, {"weight": [1, -1, 1]}, {"weight": [1, 1, -1]})
    with pytest.raises(Refused) as refused:
        all_layers(choices)
    assert [str(problem) for problem in refused.value.problems] == [
        "recipe: parameters (layer 2): linear: the weights add up to about 0 and cannot be normalized. Set normalize: "
        "false, or other weights"
    ]


def test_one_setting_for_equal_values() -> None:
    (choice,) = chosen("linear", None, {"weight": [{"filter": "mlp", "value": [0.5, 1]}, {"value": 1}]}, {"weight": 1})
    found = [choice.at(f"text.layers.4.{rest}", f"model.{rest}", DEPTH) for rest in ("mlp.up", "mlp.down", "norm")]
    assert found[0] is found[1]
    assert found[0] == found[2]
