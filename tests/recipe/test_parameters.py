"""Parameters: from a recipe to one value per model, and every value that is refused."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

from polymerge.errors import Refused, collecting
from polymerge.methods.table import METHODS
from polymerge.recipe.overrides import Choice, choices_of
from polymerge.recipe.parameters import Setting, read_parameters, without_effect
from polymerge.recipe.parsing import parse_recipe

LABELS = ("one", "two")

DEFAULTS: dict[str, dict[str, Any]] = {
    "linear": {"weight": (0.75, 0.25), "normalize": True},
    "task_arithmetic": {"weight": (0.75, 0.25), "normalize": False, "scale": 1.0},
    "ties": {"weight": (0.75, 0.25), "density": (1.0, 1.0), "elect": "weighted", "normalize": "weight",
             "trim": "tensor", "scale": 1.0},
    "dare_linear": {"weight": (0.75, 0.25), "density": (1.0, 1.0), "rescale": True, "normalize": False, "scale": 1.0},
    "dare_ties": {"weight": (0.75, 0.25), "density": (1.0, 1.0), "rescale": True, "elect": "weighted",
                  "normalize": "none", "scale": 1.0},
    "breadcrumbs": {"weight": (0.75, 0.25), "density": (1.0, 1.0), "gamma": (0.01, 0.01), "normalize": False,
                    "scale": 1.0},
    "breadcrumbs_ties": {"weight": (0.75, 0.25), "density": (1.0, 1.0), "gamma": (0.01, 0.01), "elect": "weighted",
                         "normalize": "none", "scale": 1.0},
    "della": {"weight": (0.75, 0.25), "density": (1.0, 1.0), "epsilon": (0.15, 0.15), "rescale": True,
              "elect": "weighted", "normalize": "weight", "scale": 1.0},
    "della_linear": {"weight": (0.75, 0.25), "density": (1.0, 1.0), "epsilon": (0.15, 0.15), "rescale": True,
                     "normalize": False, "scale": 1.0},
    "slerp": {"t": 0.25},
    "nuslerp": {"weight": (0.75, 0.25), "nuslerp_flatten": True, "nuslerp_row_wise": False},
    "multislerp": {"weight": (0.75, 0.25), "normalize_weights": True, "eps": 1e-8},
    "tsv": {"weight": (0.75, 0.25), "share": None, "scale": 1.0},
    "ip_merge": {"weight": (0.75, 0.25), "rank": 1024, "threshold": 0.4, "scale": 1.0},
    "copy": {},
}  # fmt: skip


def resolved(
    method: str,
    general: Any = None,
    one: Any = None,
    two: Any = None,
    override: Any = None,
    base: tuple[int, ...] = (),
    **more: Any,
) -> tuple[list[Choice], list[str]]:
    """The settings of a recipe with parameters in general, of each model and of an override; and what is wrong.

    base   places of models that are base_model
    """
    models = [{"model": "one", "parameters": one}, {"model": "two", "parameters": two}]
    overrides = [{"match": "*", "parameters": override, **more}] if override is not None or more else []
    base_model = {"base_model": "base"} if method != "linear" or more else {}
    said = {"merge_method": method, "models": models, "parameters": general, "overrides": overrides}
    return parsed(said | base_model, base)


def parsed(recipe: dict[str, Any], base: tuple[int, ...] = ()) -> tuple[list[Choice], list[str]]:
    """The settings of a recipe; and what is wrong with it, each once."""
    try:
        with collecting():
            read = parse_recipe(recipe)
            choices = choices_of(read, [entry.model for entry in read.models], read.models, base)
    except Refused as error:
        return choices, [str(problem) for problem in error.problems]
    return choices, []


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


WEIGHED = [
    name
    for name, row in METHODS.items()
    if row.on != "factors" and (row.copies or row.interpolates or row.parameter("weight"))
]

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
def test_what_all_models_share_is_said_by_the_recipe_or_an_override(
    method: str, name: str, values: tuple[Any, Any, Any]
) -> None:
    recipe, model, override = values
    weights = {} if method == "slerp" else {"weight": 1.0}
    said = {name: recipe} | weights
    assert setting(method, said)[name] == recipe
    assert setting(method, said, None, None, {name: override})[name] == override
    # mergekit does not read it in a model's entry, whether the recipe says it as well or not
    spelled = "scale or lambda" if name == "scale" else name
    refusal = (
        f"models[0] 'one': {spelled} is a single value for the merge, which mergekit does not read here. Set it in the "
        "recipe's own parameters, or remove it"
    )
    assert problem(method, said, {name: model}) == refusal
    assert problem(method, weights, {name: model}) == refusal
    both = refusal.replace("models[0] 'one'", "models[0] 'one', models[1] 'two'")
    assert problem(method, said, {name: model}, {name: recipe}) == both


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
    with suppress(Refused), collecting() as found:
        assert read_parameters({"scale": 1, "lambda": 2}, "here") == {"scale": 1}
    assert [str(one) for one in found] == ["here: scale is set twice, the second time as 'lambda'"]


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
        ((), "slerp needs `t` from 0 (base_model, or the first model) to 1, or a `weight` for each model"),
        ((None, {"weight": 1}), "slerp needs `t` from 0 (base_model, or the first model) to 1, or a `weight` for each"),
        (({"t": 1.5},), "recipe: parameters: t of slerp has to be from 0 to 1, got 1.5"),
        (({"t": "half"},), "recipe: parameters: t has to be a number, got 'half'"),
        ((None, {"weight": -1}, {"weight": 2}), "models[0] 'one': weight of slerp has to be from 0 to inf, got -1"),
        ((None, {"weight": 0}, {"weight": 0}), "slerp: the two weights are both 0"),
        (
            ({"t": 0}, None, None, {"weight": [1, 2, 3]}),
            "overrides[0]: weight has to be a number, got '3 values for 2 models'",
        ),
        (({"t": 0, "trim": "model"},), "recipe: parameters: slerp has no parameter 'trim'."),
        (({"t": 0}, None, None, {"density": 1}), "recipe: overrides[0]: slerp has no parameter 'density'."),
        (
            (None, {"t": 0}, {"t": 1}),
            "models[0] 'one', models[1] 'two': t is a single value for the merge, which merge",
        ),
    ],
)
def test_slerp_without_a_place_on_the_arc_is_refused(said: tuple[Any, ...], message: str) -> None:
    assert message in problem("slerp", *said)


@pytest.mark.parametrize(
    ("said", "t"),
    [
        (({"t": 0.3},), 0.7),
        (({"t": 0},), 1.0),
        (({"t": 0.3}, None, None, {"t": 0.1}), 0.9),
        ((None, {"weight": 1}, {"weight": 3}), 0.75),
        (({"t": 0.3}, None, None, {"weight": [1, 4]}), 0.8),
    ],
)
def test_slerp_counts_t_from_the_base_and_a_weight_is_each_model_s_say(said: tuple[Any, ...], t: float) -> None:
    assert setting("slerp", *said, base=(1,)) == {"t": t}
    first = said[0]["t"] if t != 0.75 and len(said) == 1 else None
    assert first is None or setting("slerp", *said, base=(0,)) == {"t": first}


def test_slerp_takes_two_models() -> None:
    recipe = {"merge_method": "slerp", "parameters": {"t": 0.5}, "models": ["a", "b", "c"]}
    assert parsed(recipe)[1] == ["slerp takes 2 models, the recipe has 3"]


# --- what is wrong


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (({"density": 1.01},), "recipe: parameters: density of ties has to be from 0 to 1, got 1.01"),
        (({"density": -0.1},), "recipe: parameters: density of ties has to be from 0 to 1, got -0.1"),
        ((None, {"density": 2}), "models[0] 'one': density of ties has to be from 0 to 1, got 2"),
        ((None, None, None, {"density": 2}), "recipe: overrides[0]: density of ties has to be from 0 to 1, got 2"),
        ((None, {"weight": "much"}), "models[0] 'one': weight has to be a number, got 'much'"),
        ((None, {"weight": True}), "models[0] 'one': weight has to be a number, got 'True'"),
        ((None, {"weight": float("nan")}), "models[0] 'one': weight has to be a number, got 'nan'"),
        ((None, None, {"weight": float("inf")}), "models[1] 'two': weight has to be a number, got 'inf'"),
        (({"scale": "big"},), "recipe: parameters: scale has to be a number, got 'big'"),
        ((None, None, None, {"scale": [[1, 2]]}), "overrides[0]: scale: has to be a list of numbers, got '[1, 2]'"),
        ((None, None, None, {"density": [0.5, [1, 3]]}), "overrides[0]: density of ties has to be from 0 to 1, got 3"),
        ((None, None, None, {"weight": [1]}), "overrides[0]: weight has to be a number, got '1 values for 2 models'"),
        ((None, None, None, {"weight": [1, "x"]}), "recipe: overrides[0]: weight has to be a number, got 'x'"),
        (({"elect": "majority"},), "elect of ties cannot be 'majority'. Known: unweighted, weighted."),
        (({"normalize": "counts"},), "recipe: parameters: normalize of ties cannot be 'counts'. Did you mean 'count'?"),
        (({"normalize": 2},), "recipe: parameters: normalize of ties cannot be '2'."),
        (({"trim": False},), "recipe: parameters: trim of ties cannot be 'False'."),
        (({"rescale": False},), "recipe: parameters: ties has no parameter 'rescale'. Did you mean 'scale'?"),
        ((None, {"floor": 0.5}), "models[0] 'one': ties has no parameter 'floor'."),
        ((None, None, None, {"t": 0.5}), "recipe: overrides[0]: ties has no parameter 't'."),
        (({"density": [0.1, 2]},), "recipe: parameters: density of ties has to be from 0 to 1, got 2"),
        (({"density": []},), "recipe: parameters: density: is an empty list"),
        ((None, {"density": [1, "x"]}), "models[0]: parameters: density: has to be a list of numbers, got 'x'"),
        (({"density": [0.1, {"value": 1}]},), "recipe: parameters: density: mixes plain values and conditions"),
        (({"density": {"filter": "mlp"}},), "recipe: parameters: density: has a condition without value"),
        (({"density": {"filters": "mlp", "value": 1}},), "in a condition. Did you mean 'filter'?"),
        (({"density": {"filter": 3, "value": 1}},), "has a filter that is no part of a tensor's name: '3'"),
        (({"density": {"value": [{"value": 1}]}},), "recipe: parameters: density: has conditions inside a condition"),
        (({"density": {"value": 2}},), "recipe: parameters: density of ties has to be from 0 to 1, got 2"),
        (({"normalize": ["x", 1]},), "recipe: parameters: normalize: has to be a list of numbers, got 'x'"),
        (({"normalize": [0, 1]},), "recipe: parameters: normalize: is a word, which cannot change gradually from "),
        (({"density": [0.1, 1], "trim": "model"},), "density: trim: model takes one threshold over a whole model"),
        (({"density": None},), "recipe: parameters: density: has to be a single value, got None"),
        (({"densty": 1},), "recipe: parameters: no method has a parameter 'densty'. Did you mean 'density'?"),
        (({1: 1},), "recipe: parameters: no method has a parameter '1'. Known: alpha, "),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_with_its_place(said: tuple[Any, ...], message: str) -> None:
    assert message in problem("ties", *said)


@pytest.mark.parametrize(("value", "meant"), [(1, True), (1.0, True), (0, False), (0.0, False)])
def test_a_flag_may_be_a_number_as_in_recipes_of_mergekit(value: float, meant: bool) -> None:
    weight = {"weight": 1}
    assert setting("linear", {"normalize": value} | weight)["normalize"] is meant
    assert setting("dare_linear", {"rescale": value} | weight)["rescale"] is meant
    assert setting("ties", {"normalize": value} | weight)["normalize"] == ("weight" if meant else "none")


@pytest.mark.parametrize(("value", "meant"), [("true", True), ("False", False)])
def test_a_flag_may_be_a_text(value: str, meant: bool) -> None:
    assert setting("linear", {"normalize": value, "weight": 1})["normalize"] is meant
    assert setting("ties", {"normalize": value, "weight": 1})["normalize"] == ("weight" if meant else "none")


@pytest.mark.parametrize("value", ["yes", 2, 0.5])
def test_a_flag_is_true_or_false(value: Any) -> None:
    assert problem("linear", {"normalize": value}) == (
        f"recipe: parameters: normalize has to be true or false, got '{value}'"
    )
    assert (
        problem("dare_ties", {"rescale": value})
        == f"recipe: parameters: rescale has to be true or false, got '{value}'"
    )


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_a_missing_weight_is_said_of_its_model(method: str) -> None:
    _, problems = resolved(method, None, {"weight": 1})
    assert problems == [f"models[1] 'two': {method} needs `weight`, which the recipe does not set"]
    _, problems = resolved(method)
    assert len(problems) == 2


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [("linear", "density", 0.5), ("linear", "scale", 2), ("slerp", "normalize", True), ("ties", "t", 0.5),
     ("task_arithmetic", "density", [0.1, 0.9]), ("model_stock", "weight", 0.5), ("karcher", "t", 1)],
)  # fmt: skip
def test_what_mergekit_ignores_beside_a_method_has_no_effect(method: str, name: str, value: Any) -> None:
    weight = {"weight": 1} if METHODS[method].parameter("weight") or method == "slerp" else {}
    plain, problems = resolved(method, None, weight, weight)
    assert problems == []
    assert resolved(method, {name: value}, weight, weight) == (plain, [])
    if name != "scale":
        assert resolved(method, None, weight | {name: value}, weight | {name: value}) == (plain, [])
    assert without_effect(METHODS[method], {name: value, "int8_mask": True, **weight}) == [name]


def test_metagpt_finds_its_weights_and_takes_none() -> None:
    assert resolved("metagpt")[1] == []
    _, problems = resolved("metagpt", None, {"weight": 1})
    assert problems == ["models[0] 'one': metagpt has no parameter 'weight'. Known: int8_mask, scale."]


@pytest.mark.parametrize("method", [name for name in WEIGHED if METHODS[name].on == "deltas"])
def test_deltas_need_a_base(method: str) -> None:
    recipe = {"merge_method": method, "parameters": {"weight": 1}, "models": ["a", "b"]}
    assert parsed(recipe)[1] == [f"{method} works on deltas and needs base_model, their common ancestor"]


@pytest.mark.parametrize("parameters", [{}, {"weight": [1, 2]}, {"density": 7, "t": "x"}])
def test_copy_looks_at_no_parameter(parameters: dict[str, Any]) -> None:
    choices, problems = resolved("linear", None, {"weight": 1}, {"weight": 2}, parameters, merge_method="copy")
    assert problems == []
    assert choices[0].setting == Setting("copy", {})


# --- as mergekit has it


@pytest.mark.parametrize("method", [name for name in WEIGHED if METHODS[name].on == "deltas"])
def test_the_base_among_the_models_weighs_nothing_for_methods_on_deltas(method: str) -> None:
    said = setting(method, {"normalize": True}, {"weight": 0.9}, {"weight": 0.5}, base=(0,))
    assert said["weight"] == (0.0, 0.5)
    assert setting(method, None, None, {"weight": 0.5}, base=(0,))["weight"] == (0.0, 0.5)
    # a method on weights has it as a model like any other
    assert setting("linear", None, {"weight": 0.9}, {"weight": 0.5}, base=(0,))["weight"] == (0.9, 0.5)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "dare_linear"])
@pytest.mark.parametrize("weights", [(0.1 + 0.2, -0.3), (1e-9, 2e-9), (0.5, -0.5), (0, 0)])
def test_weights_that_add_up_to_about_nothing_do_not_divide(method: str, weights: tuple[float, float]) -> None:
    one, two = ({"weight": weight} for weight in weights)
    assert problem(method, {"normalize": True}, one, two) == (
        f"recipe: parameters: {method}: the weights add up to about 0 and cannot be normalized. Set normalize: false, "
        "or other weights"
    )
    assert setting(method, {"normalize": False}, one, two)["weight"] == weights
    assert setting(method, {"normalize": True}, {"weight": 1e-8}, two)["normalize"] is True or weights[1] < 0


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_linear"])
def test_weights_that_only_the_base_keeps_from_adding_up_to_nothing_do_not_divide(method: str) -> None:
    _, problems = resolved(method, {"normalize": True}, {"weight": 0.9}, {"weight": 0}, base=(0,))
    assert [one.partition(":  ")[0] for one in problems] == [
        f"recipe: parameters: {method}: the weights add up to about 0 and cannot be normalized. Set normalize: false, "
        "or other weights"
    ]


AVERAGE = {"merge_method": "linear", "base_model": "base", "models": ["one", "two"]}


def test_an_average_beside_a_base_that_it_does_not_list_is_refused_where_mergekit_would_merge_it_in() -> None:
    def found(**more: Any) -> list[str]:
        return parsed(AVERAGE | more, (1,) if more.get("base_model") == "two" else ())[1]

    assert found(parameters={"weight": 0.5}) == [
        "linear does not read base_model, whereas mergekit merges 'base' in with the weight of parameters. List it "
        "among models to merge it, or remove base_model"
    ]
    assert found(parameters={"weight": 0.5}, base_model=None) == []
    assert found(parameters={"weight": 0.5}, base_model="two") == []
    # an override that works on deltas is what a base is for; and without a weight for all mergekit refuses
    assert found(parameters={"weight": 0.5}, overrides=[{"layers": 0, "merge_method": "ties"}]) == []
    own = [{"model": name, "parameters": {"weight": 1}} for name in LABELS]
    assert found(models=own) == []


# --- one cause, one message


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"merge_method": "slerp", "parameters": {"t": [0, 0.5, 2]}}, "t of slerp has to be from 0 to 1, got 2"),
        ({"merge_method": "slerp", "parameters": {"t": {"valu": 0.5}}}, "parameters: t: has an unknown field 'valu'"),
        ({"parameters": {"wieght": 0.5}}, "no method has a parameter 'wieght'. Did you mean 'weight'?"),
        ({"paramaters": {"weight": 0.5}}, "unknown field 'paramaters' is not supported. Did you mean 'parameters'?"),
        ({"parameters": 3}, "recipe: parameters: has to be a mapping of names to values, got '3'"),
        ({"parameters": {"weight": 1}, "models": None, "slices": []}, "slices has to be a list of at least one entry"),
        ({"parameters": {"weight": 1}, "models": None, "modules": {}}, "modules has to be a mapping of names to what"),
        ({"models": None, "model": ["one"]}, "recipe: unknown field 'model' is not supported. Did you mean 'models'?"),
        ({"models": None, "parameters": {"weight": 1}}, "recipe: models has to be a list of at least one entry"),
        ({"merge_method": "slerp", "models": ["one", 3], "parameters": {"t": 0}}, "models[1]: needs `model: FOLDER`"),
        ({"merge_method": None, "merge_metod": "ties"}, "unknown field 'merge_metod' is not supported. Did you mean"),
        ({"merge_method": "ties", "base_model": 3, "parameters": {"weight": 1}}, "base_model has to be a folder"),
        ({"merge_method": "ties", "base_modle": "x", "parameters": {"weight": 1}}, "'base_modle'"),
        ({"merge_method": "passthrough", "models": ["a", "b"]}, "mergekit's method 'passthrough' is not supported"),
        ({"merge_method": "passthrough", "parameters": {"scale": True}}, "mergekit's method 'passthrough' is "),
        ({"merge_method": "passthrough", "models": [{"model": "one", "parameters": {"scales": 1}}]}, "'passthrough'"),
        ({"merge_method": "quux", "parameters": {"gamma": 1}}, "merge_method: there is no method 'quux'. Known: "),
        ({"models": [{"model": "one", "weight": 1}]}, "models[0]: unknown field 'weight'. Known: family, "),
        ({"models": [{"model": "one", "parameter": {"weight": 1}}]}, "'parameter'. Did you mean 'parameters'?"),
        ({"models": [{"model": "one", "parameters": {"weight": ["x"]}}]}, "models[0]: parameters: weight: has "),
        ({"parameters": {"weight": 1}, "overrides": [{"layer": 0, "merge_method": "copy"}]}, "unknown field 'layer'"),
        ({"parameters": {"weight": [1, "x"], "normalize": True}}, "recipe: parameters: weight: has to be a list"),
    ],
)  # fmt: skip
def test_what_follows_from_a_mistake_is_no_mistake_of_its_own(recipe: dict[str, Any], message: str) -> None:
    whole = {"merge_method": "linear", "models": ["one", "two"], **recipe}
    (only,) = parsed({name: value for name, value in whole.items() if value is not None})[1]
    assert message in only
