"""What is varied in a recipe, and the values that it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polymerge import read_recipe
from polymerge.errors import RecipeError
from polymerge.recipe.recipe import Recipe
from polymerge.tuning.candidates import plan_candidates, read_space
from polymerge.tuning.knobs import Knob, parse_knob, turn
from polymerge.tuning.values import parse_span, parse_values
from running import checkpoint, small_llama


def recipe(method: str = "ties", models: int = 2, **more: Any) -> Recipe:
    entries = [{"model": f"m{place}"} for place in range(models)]
    return read_recipe({"merge_method": method, "base_model": "base", "models": entries, **more})


def knob(text: str | None, made: Recipe, **options: Any) -> Knob:
    problems: list[Any] = []
    found = parse_knob(text, made, problems, **options)
    assert not problems
    assert found is not None
    return found


def refused(text: str | None, made: Recipe) -> str:
    problems: list[Any] = []
    parse_knob(text, made, problems)
    (problem,) = problems
    return str(problem)


def weights(made: Recipe) -> list[Any]:
    return [entry.parameters.get("weight") for entry in made.models]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0:0.6:0.1", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)),
        ("0:1:0.05", tuple(float(f"{place * 0.05:.2f}") for place in range(21))),
        ("-1:1:1", (-1.0, 0.0, 1.0)),
        ("0:1:0.4", (0.0, 0.4, 0.8)),
        ("0.3,0,0.1", (0.0, 0.1, 0.3)),
        ("0.5", (0.5,)),
        (" 0 : 1e-1 : 0.05 ", (0.0, 0.05, 0.1)),
    ],
)
def test_values(text: str, values: tuple[float, ...]) -> None:
    assert parse_values(text) == values


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "0:1",
        "0:1:0",
        "0:1:-0.1",
        "1:0:0.1",
        "0:1:0.1:2",
        "0,,1",
        "nan",
        "0,inf",
        "0,0.0",
        "0:1:1e-9",
        "0:1e999999:1",
        "0,1e400",
    ],
)
def test_what_is_no_list_of_values(text: str) -> None:
    with pytest.raises(RecipeError, match="--values"):
        parse_values(text)


def test_spans() -> None:
    assert parse_span("0:0.6", "w") == (0.0, 0.6)
    assert parse_span("0:0.6:0.1", "w") is None
    assert parse_span("0,1", "w") is None
    with pytest.raises(RecipeError, match="no range"):
        parse_span("1:0", "w")


def test_by_default_the_second_weight_varies_and_the_template_s_is_the_rest() -> None:
    for value, rest in ((0.3, 0.7), (0.1, 0.9), (0.0, 1.0), (1.5, -0.5)):
        assert weights(turn(recipe(), {knob(None, recipe()): value})) == [rest, value]


def test_a_template_that_is_not_the_first_model() -> None:
    made = recipe()
    assert weights(turn(made, {knob(None, made, template=1): 0.3})) == [0.3, 0.7]
    assert weights(turn(made, {knob(None, made, template=None): 0.3})) == [None, 0.3]


@pytest.mark.parametrize("base", [0, 1, 2])
@pytest.mark.parametrize("method", ["task_arithmetic", "dare_linear"])
def test_the_base_among_the_models_weighs_nothing(base: int, method: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        checkpoint(tmp_path / name, small_llama(seed))
    entries: list[dict[str, Any]] = [
        {"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in ("a", "b")
    ]
    entries.insert(base, {"model": str(tmp_path / "a" / ".." / "base")})
    said = {"merge_method": method, "base_model": str(tmp_path / "base"), "models": entries}
    for template, expected in (("a", [0.7, 0.3]), ("b", [0.3, 0.7]), ("base", [0.5, 0.3])):
        made, problems = read_recipe(said | {"template": str(tmp_path / template)}), list[Any]()
        space = read_space(made, (), "0.3", problems)
        assert problems == []
        found = weights(space.turned(made, (0.3,)))
        assert found.pop(base) is None
        assert found == expected, template
        (plan,) = plan_candidates(made, space, space.points()).values()
        assert plan.settings[0].parameters["weight"] == tuple(expected)


def test_the_one_delta_of_a_base_varies(tmp_path: Path) -> None:
    one, base = (checkpoint(tmp_path / name, small_llama(seed)) for seed, name in enumerate(("a", "base")))
    made = read_recipe({"merge_method": "task_arithmetic", "base_model": str(base), "models": [str(one)]})
    problems: list[Any] = []
    assert weights(read_space(made, (), "0.3", problems).turned(made, (0.3,))) == [0.3]
    assert problems == []


def test_of_three_models_the_template_takes_what_the_others_leave() -> None:
    made = recipe(models=3)
    with pytest.raises(RecipeError, match="not every other model says its own"):
        turn(made, {knob("weight[2]", made): 0.3})
    made = read_recipe(
        {
            "merge_method": "linear",
            "models": [{"model": "a"}, {"model": "b", "parameters": {"weight": 0.1}}, {"model": "c"}],
        }
    )
    assert weights(turn(made, {knob("weight[2]", made): 0.3})) == [0.6, 0.1, 0.3]


def test_the_template_s_weight_stays_where_it_is_to() -> None:
    made = read_recipe(
        {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": [{"model": "a", "parameters": {"weight": 1}}, {"model": "b"}],
        }
    )
    assert weights(turn(made, {knob(None, made, keep_template=True): 0.3})) == [1, 0.3]
    assert weights(turn(made, {knob("weight[0]", made): 0.3})) == [0.3, None]


def test_a_parameter_of_the_method_takes_the_place_of_what_the_models_say() -> None:
    made = read_recipe(
        {
            "merge_method": "ties",
            "base_model": "base",
            "models": [{"model": "a", "parameters": {"density": 0.5}}, {"model": "b"}],
        }
    )
    turned = turn(made, {knob("density", made): 0.2})
    assert turned.parameters["density"] == 0.2
    assert all("density" not in entry.parameters for entry in turned.models)
    assert turn(made, {knob("density[1]", made): 0.2}).models[1].parameters["density"] == 0.2
    assert turn(made, {knob("scale", made): 2.0}).parameters["scale"] == 2.0


def test_slerp_varies_t() -> None:
    made = recipe("slerp", parameters={"t": 0.5})
    assert knob(None, made).name == "t"
    assert turn(made, {knob(None, made): 0.2}).parameters == {"t": 0.2}


@pytest.mark.parametrize(
    ("text", "layers", "match"),
    [
        ("density@layers:0-5", (0, 5), None),
        ("density@layers:3", (3, 3), None),
        ("density@vision", None, "vision.*"),
        ("density@text.layers.*.mlp.*", None, "text.layers.*.mlp.*"),
    ],
)
def test_for_some_tensors_only(text: str, layers: Any, match: Any) -> None:
    made = recipe(overrides=[{"layers": "0-9", "parameters": {"density": 0.9}}])
    first, second = turn(made, {knob(text, made): 0.2}).overrides
    assert (second.layers, second.match, second.parameters) == (layers, match, {"density": 0.2})
    assert first.layers == (0, 9)  # what the recipe says of some tensors goes before


def test_weights_of_some_layers_are_those_of_all_models() -> None:
    made = read_recipe(
        {
            "merge_method": "ties",
            "base_model": "base",
            "models": [
                {"model": "a", "parameters": {"weight": 0.5}},
                {"model": "b", "parameters": {"weight": 0.5}},
            ],
        }
    )
    both = {knob("weight@layers:0-1", made): 0.2, knob("scale@layers:0-1", made): 2.0, knob("weight", made): 0.3}
    turned = turn(made, both)
    (override,) = turned.overrides
    assert override.parameters == {"weight": [0.8, 0.2], "scale": 2.0}
    assert weights(turned) == [0.7, 0.3]


def test_where_two_scopes_meet_both_are_turned() -> None:
    made = recipe()
    both = {knob("density@layers:0-5", made): 0.2, knob("scale@text", made): 2.0, knob("scale@layers:4-9", made): 3.0}
    said = [(one.layers, one.match, dict(one.parameters)) for one in turn(made, both).overrides]
    assert said == [
        ((4, 5), "text.*", {"density": 0.2, "scale": 3.0}),
        ((0, 5), "text.*", {"density": 0.2, "scale": 2.0}),
        ((4, 5), None, {"density": 0.2, "scale": 3.0}),
        ((4, 9), "text.*", {"scale": 3.0}),
        ((0, 5), None, {"density": 0.2}),
        (None, "text.*", {"scale": 2.0}),
        ((4, 9), None, {"scale": 3.0}),
    ]
    apart = {knob("density@vision", made): 0.2, knob("density@text", made): 0.3}
    assert [one.match for one in turn(made, apart).overrides] == ["vision.*", "text.*"]
    with pytest.raises(RecipeError, match="may have tensors in common"):
        turn(made, {knob("density@text", made): 0.2, knob("density@text.layers.*.mlp.*", made): 0.3})


def test_several_weights_are_set_before_the_template_makes_up_for_them() -> None:
    made = recipe("linear", models=3)
    assert weights(turn(made, {knob("weight[1]", made): 0.2, knob("weight[2]", made): 0.3})) == [0.5, 0.2, 0.3]


@pytest.mark.parametrize(
    ("text", "method", "told"),
    [
        ("densty", "ties", "Did you mean 'density'"),
        ("weight[5]", "ties", "there is no models[5]"),
        ("scale[1]", "ties", "one value for all models"),
        ("density@layers:5-0", "ties", "no range of layers"),
        ("density@layers:a", "ties", "no range of layers"),
        (None, "metagpt", "has no weight, so the recipe has no free parameter. Say --vary scale"),
        (None, "copy", "has no weight, so the recipe has no free parameter. It has no parameter"),
        ("weight", "copy", "no parameter 'weight'"),
    ],
)
def test_what_cannot_be_varied(text: str | None, method: str, told: str) -> None:
    assert told in refused(text, recipe(method))


def test_a_recipe_of_one_model_has_no_second_weight() -> None:
    assert "there is no models[1]" in refused(None, recipe("linear", models=1))
