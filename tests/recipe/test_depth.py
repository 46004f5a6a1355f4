"""Gradients and conditions: what they are worth at each place, and what is neither."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymerge.recipe.depth import NOTHING, Position, filters_in, first_value, leaves, plain_value, unfit, values_at


def value(given: Any, share: float, name: str = "model.layers.0.mlp.up_proj.weight", each: bool = False) -> Any:
    return values_at({"x": plain_value(given)}, Position(share, name), lambda _: each).get("x", NOTHING)


@pytest.mark.parametrize(
    ("layer", "span", "share"),
    [(0, (0, 3), 0.0), (1, (0, 3), 1 / 3), (3, (0, 3), 1.0), (None, (0, 3), 0.0), (5, (4, 6), 0.5), (4, (4, 4), 1.0),
     (9, (0, 3), 1.0)],
)  # fmt: skip
def test_the_share_of_a_layer(layer: int | None, span: tuple[int, int], share: float) -> None:
    assert Position.of(layer, span, "").share == share


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 0.0), (0.25, 0.25), (0.5, 0.5), (0.75, 0.75), (1.0, 1.0)]
)  # fmt: skip
def test_two_numbers_are_a_straight_line(share: float, expected: float) -> None:
    assert value([0, 1], share) == expected


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.integers(1, 1000), st.integers(0, 1000))
def test_a_gradient_is_what_numpy_interpolates(numbers: list[float], steps: int, layer: int) -> None:
    share = min(layer, steps) / steps
    expected = np.interp(share, np.linspace(0, 1, len(numbers)), numbers) if len(numbers) > 1 else numbers[0]
    assert value(numbers, share) == pytest.approx(expected, abs=1e-12)


def test_the_first_condition_that_holds_counts() -> None:
    said = [{"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": 0.25}, {"value": 0.75}]
    assert value(said, 0.5, "model.layers.3.self_attn.q_proj.weight") == 0.5
    assert value(said, 0.5, "model.layers.3.mlp.up_proj.weight") == 0.25
    assert value(said, 0.5, "model.norm.weight") == 0.75
    assert value([*reversed(said)], 0.5) == 0.75
    assert value([{"filter": "*", "value": 2}, {"value": 3}], 0.5) == 2
    assert value(said[:2], 0.0, "model.norm.weight") is NOTHING
    assert value({"value": [0, 1]}, 0.5) == 0.5


def test_a_list_of_one_value_per_model_has_gradients_inside() -> None:
    said = [[0, 1], 0.25, [{"filter": "mlp", "value": 3}]]
    assert value(said, 0.5, each=True) == [0.5, 0.25, 3]
    assert value(said, 0.5, "model.norm.weight", each=True) == [0.5, 0.25, NOTHING]
    assert value([0, 1], 0.5, each=True) == [0, 1]
    assert value([{"value": [0, 1]}], 0.5, each=True) == 0.5


def test_the_first_value_the_single_values_and_the_filters() -> None:
    said = [{"filter": "a", "value": [3, 4]}, {"filter": "*", "value": 5}, {"value": 6}]
    assert first_value(said) == 3
    assert first_value([7, 8]) == 7
    assert first_value("word") == "word"
    assert list(leaves(said)) == [3, 4, 5, 6]
    assert list(filters_in(said)) == ["a"]
    assert list(filters_in([0.5, said])) == ["a"]
    assert list(filters_in([0, 1])) == []


def test_a_value_is_what_yaml_would_give() -> None:
    assert plain_value({"filter": "mlp", "value": (np.float32(0.5), 1)}) == [{"filter": "mlp", "value": [0.5, 1]}]
    assert plain_value((np.int64(2), "1e-3")) == [2.0, "1e-3"]
    assert plain_value(True) is True


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ([0, 1], ""), (["1e-3", 0.5], ""), ([{"value": True}], ""), ([{"filter": "mlp", "value": "word"}], ""),
        ([], "is an empty list"), ([0, True], "has to be a list of numbers, got 'True'"),
        ([0, [1]], "has to be a list of numbers, got '[1]'"), ([0, None], "has to be a list of numbers, got 'None'"),
        ([0, {"value": 1}], "mixes plain values and conditions"), ([{"filter": "", "value": 1}], "has a filter that"),
        ([{"filter": "mlp"}], "has a condition without value"), ([{"value": 1, "t": 2}], "has an unknown field 't'"),
        ([{"value": [1, "x"]}], "has to be a list of numbers, got 'x'"), ([{"value": []}], "is an empty list"),
        ([{"value": [{"value": 1}]}], "has conditions inside a condition"),
    ],
)  # fmt: skip
def test_what_is_neither_gradient_nor_conditions(said: list[Any], why: str) -> None:
    assert unfit(said).startswith(why)
    assert (unfit(said) == "") == (why == "")


def test_in_an_override_a_list_may_hold_anything_that_a_model_may_say() -> None:
    assert unfit([0.5, "x", [0, 1], [{"value": 1}]], by_model=True) == ""
    assert unfit([0.5, [0, "x"]], by_model=True) == "has to be a list of numbers, got 'x'"
