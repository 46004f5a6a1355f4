"""Schedules over depth: what a search varies of them, and the recipe that comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import polymerge as pm
from polymerge.cli.varied import parse_knob, parse_knobs
from polymerge.errors import PolymergeError, RecipeError
from polymerge.planning import make_plan
from polymerge.tuning.schedules import numbers_over_depth, schedule_at
from polymerge.tuning.space import make_space
from running import cli
from search_made import done, outcome, prompts_file, recipe, refused, words

LAYERS = 4
"""Of the demo's models."""


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prompts_file(tmp_path_factory.mktemp("prompts"), 6)


# --- the lists


def test_a_straight_line_is_its_ends() -> None:
    assert schedule_at({"first": 0.2, "last": 0.8}, 0.5, 4, "weight") == [0.2, 0.8]
    assert schedule_at({"last": 0.8}, 0.5, 4, "weight") == [0.5, 0.8]
    assert schedule_at({"first": 0.2}, [0.1, 0.4, 0.6], 4, "weight") == [0.2, 0.6]


@pytest.mark.parametrize("depth", [2, 5, 28, 30, 36])
def test_a_knee_and_a_step_have_a_number_for_each_layer(depth: int) -> None:
    for at in range(1, depth):
        step = schedule_at({"first": 0.1, "last": 0.7, "step": at}, None, depth, "weight")
        assert step == [0.1] * at + [0.7] * (depth - at)
        knee = schedule_at({"first": 0.1, "last": 0.7, "knee": float(at)}, None, depth, "weight")
        expected = (
            np.interp(range(depth), [0, at, depth - 1], [0.1, 0.1, 0.7]) if at < depth - 1 else [*[0.1] * at, 0.7]
        )
        np.testing.assert_allclose(knee, expected, rtol=0, atol=1e-12)
        assert knee[0] == 0.1
        assert knee[-1] == 0.7


def test_a_schedule_that_cannot_be() -> None:
    with pytest.raises(RecipeError, match="neither the recipe nor the search says the first value"):
        schedule_at({"last": 0.5}, None, 4, "weight")
    with pytest.raises(RecipeError, match="a knee or a step, not both"):
        schedule_at({"first": 0, "last": 1, "knee": 1, "step": 2}, None, 4, "weight")
    with pytest.raises(RecipeError, match="says the last value"):
        schedule_at({"first": 0.5}, [{"filter": "mlp", "value": 1}], 4, "weight")


def test_numbers_beside_a_schedule_are_the_same_everywhere() -> None:
    assert numbers_over_depth([0.5, [0.1, 0.2]], 2) == [[0.5, 0.5], [0.1, 0.2]]
    assert numbers_over_depth([[0.1, 0.2, 0.3], [0.1, 0.2]], 2) is None
    assert numbers_over_depth([None], 2) is None


# --- the command line's grammar


def test_what_is_written_and_what_is_varied() -> None:
    first, last = parse_knobs(["weight@depth=0:1:linear"], None)
    assert (first.depth, last.depth) == ("first", "last")
    assert first.span == last.span == (0.0, 1.0)
    knobs = parse_knobs(["scale[1]@depth=0:1:0.5:knee"], None)
    assert [knob.depth for knob in knobs] == ["first", "last", "knee"]
    assert [knob.values for knob in knobs] == [(0.0, 0.5, 1.0), (0.0, 0.5, 1.0), ()]
    assert {knob.model for knob in knobs} == {1}
    assert [knob.depth for knob in parse_knobs(["weight@depth=0,1:step"], None)] == ["first", "last", "step"]
    (own,) = parse_knobs(["weight@depth:last"], "0:1:0.25")
    assert (own.depth, own.values) == ("last", (0.0, 0.25, 0.5, 0.75, 1.0))
    first, bend = parse_knobs(["weight@depth:first", "weight@depth:knee"], "0,1")
    assert (first.values, bend.values) == ((0.0, 1.0), ())
    assert parse_knob("weight@depth:step").name("weight") == "weight@depth:step"
    assert parse_knob("weight@depth*").match == "depth*"


@pytest.mark.parametrize(
    ("vary", "told"),
    [
        ("weight@depth=0:1", "--vary weight@depth=0:1: says no shape (linear, knee, step)"),
        ("weight@depth", "says no shape"),
        ("weight@depth=0:1:curve", "says no shape"),
        ("weight@depth:middle=0:1", "'depth:middle' is nothing of a schedule"),
        ("weight@depth:knee=0,2", "vary weight@depth:knee: 0.0 is no layer to change at; say some of 1 to 3"),
        ("weight@depth:step=4", "4.0 is no layer to change at"),
        ("weight@depth:step=1:3", "is a layer; list those to try"),
        ("normalize@depth=0,1:linear", "only a number can change from layer to layer"),
    ],
)
def test_what_is_no_schedule(vary: str, told: str, prompts: Path, tmp_path: Path) -> None:
    more = ("--scorer", "exact", "--sampler", "random", "--vary", vary)
    ran = cli(*words(tmp_path, prompts, *more))
    assert told in ran.err, ran.err
    assert ran.status == 2
    assert "Traceback" not in ran.err
    assert not (tmp_path / "run").exists()


# --- the recipe


def turned(method: str, parameters: Any = None, keep: bool = False, **ends: Any) -> pm.Recipe:
    base = recipe(method, parameters=parameters or {})
    if method == "linear":
        del base["base_model"]
    read = pm.read_recipe(base)
    knobs = [pm.Knob("weight", values=(value,), depth=end) for end, value in ends.items()]
    space = make_space(read, knobs, keep_template_weight=keep)
    return space.turned(read, space.points()[0])


def test_the_weights_of_every_layer_add_up_to_one() -> None:
    made = turned("linear", first=0.1, last=0.7)
    assert made.models[1].parameters["weight"] == [0.1, 0.7]
    assert made.models[0].parameters["weight"] == [0.9, 0.3]
    stepped = turned("linear", first=0.0, last=1.0, step=1.0)
    assert stepped.models[1].parameters["weight"] == [0.0, 1.0, 1.0, 1.0]
    assert stepped.models[0].parameters["weight"] == [1.0, 0.0, 0.0, 0.0]
    kept = turned("task_arithmetic", keep=True, first=0.1, last=0.7)
    assert kept.models[0].parameters["weight"] == 1.0


def test_the_plan_has_the_numbers_of_each_layer() -> None:
    plan = make_plan(turned("linear", first=0.1, last=0.7))
    found = {}
    for _, piece, setting in plan.merged_pieces():
        layer = piece.canonical.split(".")[2] if piece.canonical.startswith("text.layers.") else "outside"
        found.setdefault(layer, set()).add(setting.parameters["weight"])
    expected = {str(layer): 0.1 + 0.6 * layer / (LAYERS - 1) for layer in range(LAYERS)} | {"outside": 0.1}
    assert set(found) == set(expected)
    for layer, weights in found.items():
        ((template, other),) = weights
        assert other == pytest.approx(expected[layer])
        assert template == pytest.approx(1 - expected[layer])
    stepped = make_plan(turned("linear", first=0.0, last=1.0, step=2.0))
    assert {setting.parameters["weight"] for _, _, setting in stepped.merged_pieces()} == {(1.0, 0.0), (0.0, 1.0)}


# --- searches


def test_the_last_value_is_searched_without_labels(prompts: Path, tmp_path: Path) -> None:
    done(*words(tmp_path, prompts, "--vary", "weight@depth:last", "--values", "0:1.5:0.5", "--write", tmp_path / "out"))
    found = outcome(tmp_path / "run")
    assert found["vary"] == "weight@depth:last"
    assert found["values"] == [0.0, 0.5, 1.0, 1.5]
    written = (tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8")
    assert f"weight: [0.5, {found['chosen']}]" in written  # the recipe's own weight is the first
    plan = pm.plan(tmp_path / "run" / "recipe.yaml")
    literal = pm.merge(plan, tmp_path / "again")
    assert literal.plan.hash == pm.plan(yaml.safe_load(written)).hash
    for file in ("model.safetensors",):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_a_schedule_is_searched_with_labels(prompts: Path, tmp_path: Path) -> None:
    more = ("--scorer", "exact", "--sampler", "tpe", "--trials", "4", "--vary", "weight@depth=0:1:knee")
    said = done(*words(tmp_path, prompts, *more))
    found = outcome(tmp_path / "run")
    assert found["vary"] == ["weight@depth:first", "weight@depth:last", "weight@depth:knee"]
    first, last, knee = found["chosen"]
    assert knee in (1, 2, 3)
    weights = pm.read_recipe(tmp_path / "run" / "recipe.yaml").models[1].parameters["weight"]
    assert weights == schedule_at({"first": first, "last": last, "knee": knee}, None, LAYERS, "weight")
    assert "recipe.yaml has the chosen value" in said


def test_a_schedule_in_python(prompts: Path, tmp_path: Path) -> None:
    knobs = [pm.Knob("weight", values=(0.0, 1.0), depth=end) for end in ("first", "last")]
    options = pm.SearchOptions(
        vary=knobs, keep_template_weight=True, scoring=pm.Scoring("exact"), generation=pm.Generation(max_new_tokens=3)
    )
    found = pm.search(recipe(), prompts, tmp_path / "run", options)
    assert set(found.best) == {"weight@depth:first", "weight@depth:last"}
    assert found.recipe.models[1].parameters["weight"] == list(found.best.values())
    assert len(found.curve) == 4


def test_what_the_recipe_leaves_open_has_to_be_varied(prompts: Path, tmp_path: Path) -> None:
    made = recipe()
    del made["models"][1]["parameters"]
    with pytest.raises(PolymergeError, match="says the first value of it"):
        pm.search(
            made, prompts, tmp_path / "run",
            pm.SearchOptions(vary=[pm.Knob("weight", values=(0.0, 0.5, 1.0), depth="last")], keep_template_weight=True),
        )  # fmt: skip


def test_an_end_is_varied_once(prompts: Path, tmp_path: Path) -> None:
    more = ("--scorer", "exact", "--vary", "weight@depth=0,1:linear", "--vary", "weight@depth:first=0,1")
    refused("weight@depth:first is said twice", *words(tmp_path, prompts, *more))
