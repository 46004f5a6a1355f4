"""Parameters: from a recipe to one value per model, and every value that is refused."""

from __future__ import annotations

from typing import Any

import pytest

from polymerge.errors import PolymergeError
from polymerge.methods.table import METHODS
from polymerge.planning.overrides import Choice, choices_of
from polymerge.recipe import parse_recipe
from polymerge.settings import Setting, read_parameters

LABELS = ("one", "two")

DEFAULTS: dict[str, dict[str, Any]] = {
    "linear": {"weight": (0.75, 0.25), "normalize": True},
    "task_arithmetic": {"weight": (0.75, 0.25), "normalize": False, "scale": 1.0},
    "ties": {"weight": (0.75, 0.25), "density": (1.0, 1.0), "elect": "weighted", "normalize": "weight",
             "trim": "tensor", "scale": 1.0},
    "dare_linear": {"weight": (0.75, 0.25), "density": (1.0, 1.0), "rescale": True, "normalize": False, "scale": 1.0},
    "dare_ties": {"weight": (0.75, 0.25), "density": (1.0, 1.0), "rescale": True, "elect": "weighted",
                  "normalize": "weight", "scale": 1.0},
    "slerp": {"t": 0.25},
    "copy": {},
}  # fmt: skip


def resolved(
    method: str, general: Any = None, one: Any = None, two: Any = None, override: Any = None, **more: Any
) -> tuple[list[Choice], list[str]]:
    """The settings of a recipe with parameters in general, of each model and of an override; and what is wrong."""
    found: list[PolymergeError] = []
    models = [{"model": "one", "parameters": one}, {"model": "two", "parameters": two}]
    overrides = [{"match": "*", "parameters": override, **more}] if override is not None or more else []
    recipe = parse_recipe(
        {"merge_method": method, "base_model": "base", "models": models, "parameters": general, "overrides": overrides},
        found,
    )
    choices = choices_of(recipe, LABELS, recipe.models, found)
    return choices, [str(problem) for problem in dict.fromkeys(map(str, found))]


def setting(
    method: str, general: Any = None, one: Any = None, two: Any = None, override: Any = None, **more: Any
) -> Any:
    """The parameters of the only, or of the override's, setting; nothing may be wrong."""
    choices, problems = resolved(method, general, one, two, override, **more)
    assert problems == []
    return choices[0].setting.parameters


def problem(
    method: str, general: Any = None, one: Any = None, two: Any = None, override: Any = None, **more: Any
) -> str:
    """The only thing that is wrong; models that say nothing have weights, so that these are not missing."""
    weight = {"weight": 1} if method not in ("slerp", "copy") else {}
    _, problems = resolved(method, general, weight | (one or {}), weight | (two or {}), override, **more)
    assert len(problems) == 1, problems
    return problems[0]


WEIGHED = [name for name, row in METHODS.items() if name != "metagpt" and row.on != "factors"]

# --- defaults and who is heard


@pytest.mark.parametrize("method", WEIGHED)
def test_what_is_not_said_has_its_default(method: str) -> None:
    choices, problems = resolved(method, None, {"weight": 0.75}, {"weight": 0.25})
    assert problems == []
    assert [choice.setting for choice in choices] == [Setting(method, DEFAULTS[method])]


@pytest.mark.parametrize("name", ["weight", "density"])
def test_an_override_beats_a_model_and_a_model_beats_the_recipe(name: str) -> None:
    weights = {"weight": 1.0} if name == "density" else {}
    assert setting("ties", {name: 0.5} | weights)[name] == (0.5, 0.5)
    assert setting("ties", {name: 0.5} | weights, {name: 0.25})[name] == (0.25, 0.5)
    assert setting("ties", {name: 0.5} | weights, {name: 0.25}, None, {name: 0.125})[name] == (0.125, 0.125)
    assert setting("ties", {name: 0.5} | weights, {name: 0.25}, None, {name: [0, 1]})[name] == (0.0, 1.0)


@pytest.mark.parametrize(
    ("method", "name", "values"),
    [("ties", "scale", (0.5, 2.0, 3.0)), ("ties", "trim", ("model", "tensor", "model")),
     ("linear", "normalize", (False, True, False)), ("dare_ties", "rescale", (False, True, False)),
     ("ties", "elect", ("unweighted", "weighted", "unweighted")), ("slerp", "t", (0.1, 0.2, 0.3))],
)  # fmt: skip
def test_so_it_is_for_what_all_models_share(method: str, name: str, values: tuple[Any, Any, Any]) -> None:
    recipe, model, override = values
    weights = {} if method == "slerp" else {"weight": 1.0}
    said = {name: recipe} | weights
    assert setting(method, said)[name] == recipe
    assert setting(method, said, {name: model}, {name: model})[name] == model
    assert setting(method, said, {name: model})[name] == model
    assert setting(method, said, {name: model}, {name: model}, {name: override})[name] == override


def test_models_have_to_agree_on_what_they_share() -> None:
    expected = "scale is one value for all models, and they say '2', '3': say it in parameters"
    assert problem("ties", None, {"scale": 2}, {"scale": 3}) == expected


def test_an_override_of_a_method_has_that_method_s_parameters() -> None:
    choices, problems = resolved(
        "linear", {"normalize": False}, {"weight": 3}, {"weight": 1}, {"density": 0.5}, merge_method="ties"
    )
    assert problems == []
    special, general = (choice.setting for choice in choices)
    assert (special.method, general.method) == ("ties", "linear")
    assert special.parameters["density"] == (0.5, 0.5)
    assert special.parameters["weight"] == general.parameters["weight"] == (3.0, 1.0)
    assert special.parameters["normalize"] == "none"
    assert general.parameters["normalize"] is False


# --- spellings


@pytest.mark.parametrize("text", ["1e-3", "0.001", ".001", 1e-3])
def test_numbers_that_yaml_takes_for_text_are_numbers(text: Any) -> None:
    assert setting("ties", {"weight": text, "density": text, "scale": text})["scale"] == 0.001
    assert setting("ties", {"weight": text})["weight"] == (0.001, 0.001)


def test_lambda_is_scale() -> None:
    assert setting("task_arithmetic", {"weight": 1, "lambda": 0.3})["scale"] == 0.3
    found: list[PolymergeError] = []
    assert read_parameters({"scale": 1, "lambda": 2}, "here", found) == {"scale": 1}
    assert [str(one) for one in found] == ["here: scale is said twice, the second time as 'lambda'"]


@pytest.mark.parametrize("method", WEIGHED)
def test_int8_mask_is_taken_and_means_nothing(method: str) -> None:
    with_it, without = (
        resolved(method, mask, {"weight": 1} | mask, {"weight": 1}, mask) for mask in ({"int8_mask": True}, {})
    )
    assert with_it == without
    assert with_it[1] == []


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_normalize_of_mergekit_is_true_or_false(method: str) -> None:
    assert setting(method, {"weight": 1, "normalize": True})["normalize"] == "weight"
    assert setting(method, {"weight": 1, "normalize": False})["normalize"] == "none"
    assert setting(method, {"weight": 1, "normalize": "count"})["normalize"] == "count"


# --- slerp


@pytest.mark.parametrize(
    ("said", "t"),
    [
        (({"t": 0.3},), 0.3),
        (({"t": "1"},), 1.0),
        ((None, {"weight": 1}, {"weight": 3}), 0.75),
        ((None, {"weight": 0}, {"weight": 2}), 1.0),
        (({"weight": 2}, None, {"weight": 6}), 0.75),
        (({"weight": 2},), 0.5),
        (({"t": 0.3}, {"weight": 1}, {"weight": 3}), 0.3),
        (({"t": 0.3}, None, None, {"t": 0.4}), 0.4),
        (({"t": 0.3}, None, None, {"weight": [1, 4]}), 0.8),
        ((None, {"weight": 1}, {"weight": 3}, {"weight": [4, 1]}), 0.2),
        ((None, {"weight": 1}, {"weight": 3}, {"t": 0.4}), 0.4),
    ],
)
def test_slerp_takes_t_or_weights(said: tuple[Any, ...], t: float) -> None:
    assert setting("slerp", *said) == {"t": t}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ((), "slerp needs `t` from 0 (first model) to 1 (second), or a `weight` for each model"),
        ((None, {"weight": 1}), "slerp needs `t` from 0 (first model) to 1 (second), or a `weight` for each model"),
        (({"t": 1.5},), "recipe: parameters: t of slerp lies from 0 to 1, got 1.5"),
        (({"t": "half"},), "recipe: parameters: t is a number, got 'half'"),
        ((None, {"weight": -1}, {"weight": 2}), "models[0] 'one': weight of slerp lies from 0 to inf, got -1"),
        ((None, {"weight": 0}, {"weight": 0}), "slerp: the two weights are both 0"),
        (
            ({"t": 0}, None, None, {"weight": [1, 2, 3]}),
            "overrides[0]: weight is a number, got '3 values for 2 models'",
        ),
        (({"t": 0, "density": 1},), "recipe: parameters: slerp has no parameter 'density'."),
        ((None, {"t": 0}, {"t": 1}), "t is one value for all models, and they say '0', '1': say it in parameters"),
    ],
)
def test_slerp_without_a_place_on_the_arc_is_refused(said: tuple[Any, ...], message: str) -> None:
    assert message in problem("slerp", *said)


def test_slerp_takes_two_models() -> None:
    found: list[PolymergeError] = []
    recipe = parse_recipe({"merge_method": "slerp", "parameters": {"t": 0.5}, "models": ["a", "b", "c"]}, found)
    choices_of(recipe, ("a", "b", "c"), recipe.models, found)
    assert [str(one) for one in found] == ["slerp takes 2 models, the recipe has 3"]


# --- what is wrong


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (({"density": 1.01},), "recipe: parameters: density of ties lies from 0 to 1, got 1.01"),
        (({"density": -0.1},), "recipe: parameters: density of ties lies from 0 to 1, got -0.1"),
        ((None, {"density": 2}), "models[0] 'one': density of ties lies from 0 to 1, got 2"),
        ((None, None, None, {"density": 2}), "recipe: overrides[0]: density of ties lies from 0 to 1, got 2"),
        ((None, {"weight": "much"}), "models[0] 'one': weight is a number, got 'much'"),
        ((None, {"weight": True}), "models[0] 'one': weight is a number, got 'True'"),
        ((None, {"weight": float("nan")}), "models[0] 'one': weight is a number, got 'nan'"),
        ((None, None, {"weight": float("inf")}), "models[1] 'two': weight is a number, got 'inf'"),
        (({"scale": "big"},), "recipe: parameters: scale is a number, got 'big'"),
        ((None, None, None, {"scale": [1, 2]}), "recipe: overrides[0]: scale is a number, got '[1, 2]'"),
        ((None, None, None, {"weight": [1]}), "recipe: overrides[0]: weight is a number, got '1 values for 2 models'"),
        ((None, None, None, {"weight": [1, "x"]}), "recipe: overrides[0]: weight is a number, got 'x'"),
        (({"elect": "majority"},), "elect of ties cannot be 'majority'. Known: unweighted, weighted."),
        (({"normalize": "counts"},), "recipe: parameters: normalize of ties cannot be 'counts'. Did you mean 'count'?"),
        (({"normalize": 1},), "recipe: parameters: normalize of ties cannot be '1'."),
        (({"trim": False},), "recipe: parameters: trim of ties cannot be 'False'."),
        (({"rescale": False},), "recipe: parameters: ties has no parameter 'rescale'. Did you mean 'scale'?"),
        ((None, {"t": 0.5}), "models[0] 'one': ties has no parameter 't'."),
        ((None, None, None, {"t": 0.5}), "recipe: overrides[0]: ties has no parameter 't'."),
        (({"density": [0.1, 0.2]},), "recipe: parameters: density: values that change from layer to layer are not "),
        ((None, {"density": [1, 0]}), "recipe: models[0]: parameters: density: values that change from layer to layer"),
        (({"density": {"value": 1}},), "recipe: parameters: density: has to be one value, got {'value': 1}"),
        (({"density": None},), "recipe: parameters: density: has to be one value, got None"),
        (({"densty": 1},), "recipe: parameters: no method has a parameter 'densty'. Did you mean 'density'?"),
        (({1: 1},), "recipe: parameters: no method has a parameter '1'. Known: compose, density, elect, "),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_with_its_place(said: tuple[Any, ...], message: str) -> None:
    assert message in problem("ties", *said)


@pytest.mark.parametrize("value", ["yes", 1, 0.5])
def test_a_flag_is_true_or_false(value: Any) -> None:
    assert problem("linear", {"normalize": value}) == (f"recipe: parameters: normalize is true or false, got '{value}'")
    assert problem("dare_ties", {"rescale": value}) == f"recipe: parameters: rescale is true or false, got '{value}'"


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_a_missing_weight_is_said_of_its_model(method: str) -> None:
    _, problems = resolved(method, None, {"weight": 1})
    assert problems == [f"models[1] 'two': {method} needs `weight`, and the recipe does not say it"]
    _, problems = resolved(method)
    assert len(problems) == 2


def test_metagpt_finds_its_weights_and_takes_none() -> None:
    assert resolved("metagpt")[1] == []
    _, problems = resolved("metagpt", None, {"weight": 1})
    assert problems == ["models[0] 'one': metagpt has no parameter 'weight'. Known: int8_mask, scale."]


@pytest.mark.parametrize("method", [name for name in WEIGHED if METHODS[name].on == "deltas"])
def test_deltas_need_a_base(method: str) -> None:
    found: list[PolymergeError] = []
    recipe = parse_recipe({"merge_method": method, "parameters": {"weight": 1}, "models": ["a", "b"]}, found)
    choices_of(recipe, ("a", "b"), recipe.models, found)
    assert [str(one) for one in found] == [f"{method} works on deltas and needs base_model, their common ancestor"]


@pytest.mark.parametrize("parameters", [{}, {"weight": [1, 2]}, {"density": 7, "t": "x"}])
def test_copy_looks_at_no_parameter(parameters: dict[str, Any]) -> None:
    choices, problems = resolved("linear", None, {"weight": 1}, {"weight": 2}, parameters, merge_method="copy")
    assert problems == []
    assert choices[0].setting == Setting("copy", {})
