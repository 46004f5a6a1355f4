"""What is varied in a recipe, and the recipe with it at a value."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from polymerge import read_recipe
from polymerge.errors import RecipeError
from polymerge.planning import make_plan
from polymerge.recipe.recipe import Recipe
from polymerge.tuning.knobs import Axis, Knob, Roles, axis_of, turn
from polymerge.tuning.schedules import Depth
from polymerge.tuning.space import candidate_name, make_space, plan_candidates
from running import checkpoint, small_llama


def recipe(method: str = "ties", models: int = 2, **more: Any) -> Recipe:
    entries = [{"model": f"m{place}"} for place in range(models)]
    return read_recipe({"merge_method": method, "base_model": "base", "models": entries, **more})


def axis(
    made: Recipe, parameter: str | None = None, *, template: int | None = 0, keep: bool = False, **said: Any
) -> Axis:
    """The axis of a parameter, whatever its values are."""
    knob = Knob(parameter, **({"values": (0.5,)} | said))
    return axis_of(knob, made, Roles(template), keep_template_weight=keep)


def weights(made: Recipe) -> list[Any]:
    return [entry.parameters.get("weight") for entry in made.models]


def test_by_default_the_second_weight_varies_and_the_template_s_is_the_rest() -> None:
    for value, rest in ((0.3, 0.7), (0.1, 0.9), (0.0, 1.0), (1.5, -0.5)):
        assert weights(turn(recipe(), {axis(recipe()): value})) == [rest, value]


def test_a_template_that_is_not_the_first_model() -> None:
    made = recipe()
    assert weights(turn(made, {axis(made, template=1): 0.3})) == [0.3, 0.7]
    assert weights(turn(made, {axis(made, template=None): 0.3})) == [None, 0.3]


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
        made = read_recipe(said | {"template": str(tmp_path / template)})
        space = make_space(made, [Knob(values=(0.3,))])
        found = weights(space.turned(made, (0.3,)))
        assert found.pop(base) is None
        assert found == expected, template
        (plan,) = plan_candidates(made, space, space.points()).values()
        assert plan.settings[0].parameters["weight"] == tuple(expected)


@pytest.mark.parametrize("depths", [("first", "last"), ("first", "last", "step"), ()])
def test_candidates_are_planned_from_the_headers_once(
    depths: Sequence[Depth], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [str(checkpoint(tmp_path / name, small_llama(seed))) for seed, name in enumerate(("a", "b"))]
    made = read_recipe({"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}})
    knobs = [Knob("weight", values=(1.0,) if depth == "step" else (0.0, 0.5, 1.0), depth=depth) for depth in depths]
    space = make_space(made, knobs)
    expected = {candidate_name(space, point): make_plan(space.turned(made, point)) for point in space.points()}
    planned = list[Recipe]()
    monkeypatch.setattr("polymerge.tuning.space.make_plan", lambda one: planned.append(one) or make_plan(one))
    assert plan_candidates(made, space, space.points()) == expected
    assert len(planned) == 1
    first, *rest = space.points()
    like = make_plan(space.turned(made, first)), space.turned(made, first)
    found = plan_candidates(made, space, rest, like)
    assert found == {name: plan for name, plan in expected.items() if name != candidate_name(space, first)}
    assert len(planned) == 1


def test_the_one_delta_of_a_base_varies(tmp_path: Path) -> None:
    one, base = (checkpoint(tmp_path / name, small_llama(seed)) for seed, name in enumerate(("a", "base")))
    made = read_recipe({"merge_method": "task_arithmetic", "base_model": str(base), "models": [str(one)]})
    assert weights(make_space(made, [Knob(values=(0.3,))]).turned(made, (0.3,))) == [0.3]


def test_of_three_models_the_template_takes_what_the_others_leave() -> None:
    made = recipe(models=3)
    with pytest.raises(RecipeError, match="not every other model says its own"):
        turn(made, {axis(made, "weight", model=2): 0.3})
    made = read_recipe(
        {
            "merge_method": "linear",
            "models": [{"model": "a"}, {"model": "b", "parameters": {"weight": 0.1}}, {"model": "c"}],
        }
    )
    assert weights(turn(made, {axis(made, "weight", model=2): 0.3})) == [0.6, 0.1, 0.3]


def test_the_template_s_weight_stays_where_it_is_to() -> None:
    made = read_recipe(
        {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": [{"model": "a", "parameters": {"weight": 1}}, {"model": "b"}],
        }
    )
    assert weights(turn(made, {axis(made, keep=True): 0.3})) == [1, 0.3]
    assert weights(turn(made, {axis(made, "weight", model=0): 0.3})) == [0.3, None]


def test_a_parameter_of_the_method_takes_the_place_of_what_the_models_say() -> None:
    made = read_recipe(
        {
            "merge_method": "ties",
            "base_model": "base",
            "models": [{"model": "a", "parameters": {"density": 0.5}}, {"model": "b"}],
        }
    )
    turned = turn(made, {axis(made, "density"): 0.2})
    assert turned.parameters["density"] == 0.2
    assert all("density" not in entry.parameters for entry in turned.models)
    assert turn(made, {axis(made, "density", model=1): 0.2}).models[1].parameters["density"] == 0.2
    assert turn(made, {axis(made, "scale"): 2.0}).parameters["scale"] == 2.0


def test_slerp_varies_t() -> None:
    made = recipe("slerp", parameters={"t": 0.5})
    assert axis(made).name == "t"
    assert turn(made, {axis(made): 0.2}).parameters == {"t": 0.2}


@pytest.mark.parametrize(
    ("said", "layers", "match"),
    [
        ({"layers": (0, 5)}, (0, 5), None),
        ({"layers": (3, 3)}, (3, 3), None),
        ({"part": "vision"}, None, "vision.*"),
        ({"match": "text.layers.*.mlp.*"}, None, "text.layers.*.mlp.*"),
    ],
)
def test_for_some_tensors_only(said: dict[str, Any], layers: Any, match: Any) -> None:
    made = recipe(overrides=[{"layers": "0-9", "parameters": {"density": 0.9}}])
    first, second = turn(made, {axis(made, "density", **said): 0.2}).overrides
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
    both = {
        axis(made, "weight", layers=(0, 1)): 0.2,
        axis(made, "scale", layers=(0, 1)): 2.0,
        axis(made, "weight"): 0.3,
    }
    turned = turn(made, both)
    (override,) = turned.overrides
    assert override.parameters == {"weight": [0.8, 0.2], "scale": 2.0}
    assert weights(turned) == [0.7, 0.3]


def test_where_two_scopes_meet_both_are_turned() -> None:
    made = recipe()
    both = {
        axis(made, "density", layers=(0, 5)): 0.2,
        axis(made, "scale", part="text"): 2.0,
        axis(made, "scale", layers=(4, 9)): 3.0,
    }
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
    apart = {axis(made, "density", part="vision"): 0.2, axis(made, "density", part="text"): 0.3}
    assert [one.match for one in turn(made, apart).overrides] == ["vision.*", "text.*"]
    with pytest.raises(RecipeError, match="may have tensors in common"):
        turn(made, {axis(made, "density", part="text"): 0.2, axis(made, "density", match="text.layers.*.mlp.*"): 0.3})


def test_several_weights_are_set_before_the_template_makes_up_for_them() -> None:
    made = recipe("linear", models=3)
    assert weights(turn(made, {axis(made, "weight", model=1): 0.2, axis(made, "weight", model=2): 0.3})) == [
        0.5,
        0.2,
        0.3,
    ]


@pytest.mark.parametrize(
    ("knob", "method", "told"),
    [
        (Knob("densty"), "ties", "Did you mean 'density'"),
        (Knob("weight", model=5), "ties", r"there is no models\[5\]"),
        (Knob("scale", model=1), "ties", "one value for all models"),
        (Knob(), "metagpt", "has no weight, so the recipe has no free parameter. Vary scale"),
        (Knob(), "copy", "has no weight, so the recipe has no free parameter. It has no parameter"),
        (Knob("weight"), "copy", "no parameter 'weight'"),
        (Knob("scale"), "ties", "vary scale: say which values"),
        (Knob(values=(0.1, "a")), "ties", "vary weight: 'a' is no number"),
        (Knob(values=(0.1, True)), "ties", "'True' is no number"),
        (Knob(values=(0.1, float("nan"))), "ties", "'nan' is no number"),
        (Knob(values=(0.1, 0.1)), "ties", "has 0.1 twice"),
        (Knob(span=(1.0, 0.0)), "ties", "1 to 0 is no range"),
        (Knob("normalize", values=(0.5,)), "linear", "normalize cannot be '0.5'; it is one of true, false"),
        (Knob("normalize", values=(True,)), "ties", "normalize cannot be 'True'; it is one of weight, count, none"),
        (Knob("normalize", span=(0.0, 1.0)), "ties", "only a number is drawn from a range"),
    ],
)
def test_what_cannot_be_varied(knob: Knob, method: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        axis_of(knob, recipe(method), Roles())


def test_a_recipe_of_one_model_has_no_second_weight() -> None:
    with pytest.raises(RecipeError, match=r"there is no models\[1\]"):
        axis(recipe("linear", models=1))


def test_values_come_in_order_and_in_the_parameter_s_kind() -> None:
    assert axis(recipe()).values == (0.5,)
    assert axis_of(Knob(), recipe(), Roles()).values == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    assert axis(recipe(), values=(1, 0.3, 0)).values == (0.0, 0.3, 1.0)
    assert axis(recipe("linear"), "normalize", values=(True, False)).values == (True, False)
    assert axis_of(Knob("scale", span=(0.0, 1.0)), recipe(), Roles()).values == ()


def test_within_some_layers_no_other_model_s_numbers_may_change() -> None:
    made = read_recipe(
        {"merge_method": "ties", "base_model": "o", "models": ["a", {"model": "b", "parameters": {"density": [0, 1]}}]}
    )
    with pytest.raises(RecipeError, match="density of another model changes from layer to layer, which it would do"):
        turn(made, {axis(made, "density", model=0, layers=(0, 1)): 0.5})
    turned = turn(made, {axis(made, "density", model=0): 0.5})
    assert [entry.parameters["density"] for entry in turned.models] == [0.5, [0, 1]]
