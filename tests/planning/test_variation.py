"""A plan that is varied is the plan of the varied recipe, or there is none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from polymerge.planning import Plan, make_plan
from polymerge.planning.variation import varied
from polymerge.recipe.parsing import read_recipe
from polymerge.recipe.recipe import Recipe
from search_made import BASE, REASON, VLM, recipe

COPY = {"merge_method": "copy"}


def weighed(*weights: object) -> dict[str, Any]:
    named = zip((VLM, REASON), weights, strict=True)
    return {"models": [{"model": model, "parameters": {"weight": weight}} for model, weight in named]}


SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "weights": ({}, {"models": [0.3, 0.7]}),
    "weights of a method without a base": ({"merge_method": "linear"}, {"models": [0.3, 0.7]}),
    "a parameter of the method": ({"merge_method": "ties"}, {"parameters": {"density": 0.3, "trim": "model"}}),
    "random draws": (
        {"merge_method": "dare_ties", "parameters": {"density": 0.5}},
        {"merge_method": "dare_ties", "parameters": {"density": 0.3}},
    ),
    "t of a method that counts it from the base": (
        {"merge_method": "slerp", "base_model": REASON, "parameters": {"t": 0.3}},
        {"parameters": {"t": 0.4}},
    ),
    "an override": (
        {"overrides": [{"layers": "0-1", "parameters": {"scale": 0.5}}, {"layers": "3", "merge_method": "copy"}]},
        {"overrides": [{"layers": "0-1", "parameters": {"scale": 0.7}}, {"layers": "3", "merge_method": "copy"}]},
    ),
    "two settings become one": (
        {"overrides": [{"layers": "0-1", "parameters": {"scale": 0.5}}]},
        {"overrides": [{"layers": "0-1", "parameters": {"scale": 1.0}}]},
    ),
    "a gradient": (weighed([1, 0.5], [0, 0.5]), weighed([1, 0.2, 0.3, 0.4], [0, 0.8, 0.7, 0.6])),
    "a number becomes a gradient": (weighed(1, 0.5), weighed(1, [0, 0.7])),
    "a gradient becomes a number": ({"parameters": {"scale": [0, 1]}}, {"parameters": {"scale": 0.3}}),
    "filters with gradients": (
        {"parameters": {"scale": [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 0.5}]}},
        {"parameters": {"scale": [{"filter": "mlp", "value": [0.9, 0.2]}, {"value": [0.1, 0.2]}]}},
    ),
    "gradients within the layers of an override": (
        {"overrides": [{"layers": "1-2", "parameters": {"weight": [1, [0, 1]]}}, {"layers": "0", **COPY}]},
        {"overrides": [{"layers": "1-2", "parameters": {"weight": [1, [1, 0.25]]}}, {"layers": "0", **COPY}]},
    ),
    "a gradient of a method on matrices": (
        {"merge_method": "iso_c", "parameters": {"scale": [0.5, 1]}},
        {"merge_method": "iso_c", "parameters": {"scale": [0.25, 1.5]}},
    ),
    "calibrated or not": ({"parameters": {"scale": 1}}, {"parameters": {"scale": [1, 0.5], "calibrate": "svc"}}),
    "a schedule that is measured as a whole": (
        {"merge_method": "metagpt", "models": [VLM, REASON], "parameters": {"scale": [0.5, 1]}},
        {"merge_method": "metagpt", "models": [VLM, REASON], "parameters": {"scale": [0.25, 1.5]}},
    ),
}
ANEW: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "another layer": (
        {"overrides": [{"layers": "0-1", "parameters": {"scale": 0.5}}]},
        {"overrides": [{"layers": "0-2", "parameters": {"scale": 0.5}}]},
    ),
    "another method": ({}, {"merge_method": "ties"}),
    "another filter": (
        {"parameters": {"scale": [{"filter": "mlp", "value": 0.1}, {"value": 0.5}]}},
        {"parameters": {"scale": [{"filter": "attn", "value": 0.1}, {"value": 0.5}]}},
    ),
    "a gradient with a value that is refused": ({"merge_method": "ties"}, {"parameters": {"density": [0.5, 3.0]}}),
    "a parameter that has no effect": ({}, {"parameters": {"int8_mask": True}}),
    "another seed": ({}, {"seed": 7}),
    "draws, which the plan notes": ({"merge_method": "dare_ties"}, {"parameters": {"density": 0.3}}),
    "a base that may be one of two models by another name": (
        {"merge_method": "slerp", "base_model": f"{REASON}/../reason", "parameters": {"t": 0.3}},
        {"parameters": {"t": 0.4}},
    ),
    "a value that is refused": ({"merge_method": "ties"}, {"parameters": {"density": 3.0}}),
    "the base among the models": (
        {"models": [{"model": VLM, "parameters": {"weight": 1}}, {"model": BASE}, {"model": REASON,
                    "parameters": {"weight": 0.5}}]},
        {"models": [{"model": VLM, "parameters": {"weight": 1}}, {"model": BASE}, {"model": REASON,
                    "parameters": {"weight": 0.7}}]},
    ),
}  # fmt: skip


def both(before: dict[str, Any], after: dict[str, Any]) -> tuple[Recipe, Recipe]:
    was = {**recipe(), **before}
    now = {**was, **after}
    if all(isinstance(weight, float) for weight in after.get("models", ())):
        now["models"] = [
            {**entry, "parameters": {"weight": weight}}
            for entry, weight in zip(was["models"], after.get("models", (1.0, 0.5)), strict=True)
        ]
    return read_recipe(was), read_recipe(now)


@pytest.mark.parametrize("case", SAME)
def test_it_is_the_plan_of_the_recipe(case: str) -> None:
    was, now = both(*SAME[case])
    plan, expected = make_plan(was), make_plan(now)
    assert isinstance(plan, Plan)
    found = varied(plan, was, now)
    assert found == expected
    assert found is not None
    assert found.hash == expected.hash
    assert found != plan


@pytest.mark.parametrize("case", ANEW)
def test_where_more_than_settings_may_differ_there_is_none(case: str) -> None:
    was, now = both(*ANEW[case])
    plan = make_plan(was)
    assert isinstance(plan, Plan)
    assert varied(plan, was, now) is None


def test_a_plan_that_was_written_does_not_say_how_many_layers_a_schedule_is_over() -> None:
    was, now = both({"parameters": {"scale": [0, 1]}}, {"parameters": {"scale": [0, 0.5]}})
    plan = make_plan(make_plan(was).to_json())
    assert varied(plan, was, now) is None
    assert varied(plan, was, replace(now, parameters={"scale": 0.5})) is not None


def test_a_recipe_varied_by_nothing_is_itself() -> None:
    was, _ = both({}, {})
    plan = make_plan(was)
    assert isinstance(plan, Plan)
    assert varied(plan, was, replace(was)) == plan
