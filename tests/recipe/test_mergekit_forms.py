"""Slices, modules and mappings of mergekit's recipes: what they are read as, and which are refused with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polymerge.errors import Refused
from polymerge.recipe.mergekit_forms import source_of
from polymerge.recipe.parsing import read_recipe
from polymerge.recipe.recipe import Recipe, recipe_dict


def source(model: str, first: int, end: int, **parameters: Any) -> dict[str, Any]:
    return {"model": model, "layer_range": [first, end]} | ({"parameters": parameters} if parameters else {})


def one(*sources: dict[str, Any], **parameters: Any) -> dict[str, Any]:
    return {"sources": list(sources)} | ({"parameters": parameters} if parameters else {})


def read(method: str, *slices: dict[str, Any], **more: Any) -> Recipe:
    return read_recipe({"merge_method": method, "slices": list(slices), **more})


def refusals(recipe: dict[str, Any]) -> list[str]:
    with pytest.raises(Refused) as refused:
        read_recipe({"merge_method": "linear", **recipe})
    return list(map(str, refused.value.problems))


def test_one_slice_of_all_layers_is_models_and_parameters() -> None:
    found = read("slerp", one(source("a", 0, 4), source("b", 0, 4)), base_model="a", parameters={"t": [0, 0.5, 1]})
    assert found == read_recipe(
        {
            "merge_method": "slerp",
            "base_model": "a",
            "models": ["a", "b"],
            "parameters": {"t": [0, 0.5, 1]},
            "layers": 4,
        }
    )
    (told,) = found.notes
    assert told.startswith("slices keep all layers in place and are read as {")
    assert '"models": [{"model": "a"}, {"model": "b"}]' in told
    assert read_recipe(recipe_dict(found)) == found


def test_a_slice_s_own_say_goes_before_the_recipe_s() -> None:
    slices = one(source("a", 0, 4, weight=1), source("b", 0, 4, weight=2), density=0.5)
    found = read("ties", slices, base_model="o", parameters={"density": 0.9, "normalize": False})
    assert [dict(entry.parameters) for entry in found.models] == [{"weight": 1}, {"weight": 2}]
    assert found.parameters == {"density": 0.5, "normalize": False}
    # where no condition of the slice holds, the recipe's counts
    slices = one(source("a", 0, 4), source("b", 0, 4), t={"filter": "mlp", "value": 0.3})
    found = read("slerp", slices, parameters={"t": [{"filter": "norm", "value": [0, 1]}, {"value": 0.5}]})
    assert found.parameters["t"] == [
        {"filter": "mlp", "value": 0.3}, {"filter": "norm", "value": [0, 1]}, {"value": 0.5},
    ]  # fmt: skip


def test_several_slices_are_overrides_of_their_layers() -> None:
    found = read(
        "ties",
        one(source("a", 0, 2, weight=0.5), source("b", 0, 2, weight=[0.4, 0.8])),
        one(source("a", 2, 4, weight=0.1, density=0.3), source("b", 2, 4, weight=0.9)),
        base_model="o",
        parameters={"scale": [1, 2]},
    )
    assert [dict(entry.parameters) for entry in found.models] == [{"weight": 0.5}, {"weight": [0.4, 0.8]}]
    assert [(override.layers, override.match) for override in found.overrides] == [
        ((0, 1), None), ((2, 3), None), (None, "text.norm*"), (None, "text.lm_head*"),
    ]  # fmt: skip
    first, second, norm, head = (dict(override.parameters) for override in found.overrides)
    assert first == {"weight": [0.5, [0.4, 0.8]], "scale": [1, 2]}
    assert second == {"weight": [0.1, 0.9], "density": [0.3, 1.0], "scale": [1, 2]}
    assert norm == head == second
    assert found.layers == 4
    assert read_recipe(recipe_dict(found)) == found


def test_equal_slices_need_no_more_for_what_follows_them() -> None:
    same = [one(source("a", first, first + 2), source("b", first, first + 2)) for first in (0, 2)]
    found = read("slerp", *same, parameters={"t": [0, 1]})
    assert [override.match for override in found.overrides] == [None, None]
    assert [dict(override.parameters) for override in found.overrides] == [{"t": [0, 1]}] * 2


def test_a_model_that_a_slice_lacks_has_no_weight_there() -> None:
    found = read(
        "linear", one(source("a", 0, 2, weight=1)), one(source("a", 2, 4, weight=1), source("b", 2, 4, weight=3))
    )
    assert [override.parameters["weight"] for override in found.overrides[:2]] == [[1, 0.0], [1, 3]]
    (said,) = refusals({
        "merge_method": "karcher",
        "slices": [one(source("a", 0, 2)), one(source("a", 2, 4), source("b", 2, 4))],
    })  # fmt: skip
    assert said.startswith(
        "recipe: slices: these merge other models in some layers than in others, and karcher has no "
    )


STAY = "Layers stay in place here: for a model with other layers, make it with mergekit's passthrough and merge that"


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([one(source("a", 0, 3)), one(source("a", 2, 4))], "slices[1]: begins with layer 2 where layer 3 would follow: "
         f"these slices repeat or move layers. {STAY}"),
        ([one(source("a", 0, 2)), one(source("a", 3, 4))], "where layer 2 would follow: these slices drop layers. "),
        ([one(source("a", 1, 4))], "slices[0]: begins with layer 1 where layer 0 would follow: these slices drop "),
        ([one(source("a", 0, 4), source("b", 4, 8))], "layers 0-3 of one model and 4-7 of another move some of them."),
        ([one(source("a", 0, 4), source("a", 0, 4))], "sources[1]: 'a' stands here twice."),
        ([one(source("a", 4, 4))], "layer_range has to be two numbers, the first layer and the one after the last"),
        ([one({"model": "a"})], "slices[0]: sources[0]: layer_range has to be two numbers"),
        ([one({"layer_range": [0, 4]})], "slices[0]: sources[0]: needs `model: FOLDER`"),
        ([one({"modle": "a", "layer_range": [0, 4]})], "unknown field 'modle'. Did you mean 'model'?"),
        ([one()], "slices[0]: sources has to be a list of models"),
        ([{"sources": [source("a", 0, 4)], "residual_weight": 0.5}], "slices[0]: residual_weight is not supported"),
        ([{"sources": [source("a", 0, 4)], "base_model": "b"}], "slices[0]: base_model is another than the recipe's."),
        ([{"sources": [source("a", 0, 4)], "parameters": 3}], "slices[0]: parameters: has to be a mapping of names"),
        ([3], "slices[0]: has to be a mapping, got '3'"), (3, "slices has to be a list"), ([], "slices has to be a"),
        ([one(source("a", 0, 2, normalize=True)), one(source("a", 2, 4))], "normalize is a single value for the merge"),
    ],
)  # fmt: skip
def test_slices_that_cannot_be_are_refused_once(slices: Any, message: str) -> None:
    (said,) = refusals({"slices": slices})
    assert message in said


def test_one_merge_of_all_modules_is_a_recipe() -> None:
    module = {"models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 0.5}}
    plain = {"merge_method": "linear", "models": ["a", "b"], "parameters": {"weight": 0.5, "normalize": False}}
    more = {"merge_method": "linear", "parameters": {"normalize": False}}
    assert read_recipe(more | {"modules": {"default": module}}) == read_recipe(plain)
    assert read_recipe(more | {"modules": {"vision_tower": module, "text_decoder": module}}) == read_recipe(plain)
    assert read_recipe(more | {"modules": {"text_decoder": module}}) == read_recipe(plain | {"parts": ["text"]})
    sliced = {"slices": [one(source("a", 0, 4), source("b", 0, 4), weight=0.5)]}
    assert read_recipe(more | {"modules": {"default": sliced}}) == read_recipe(plain | {"layers": 4})


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"a": {"models": ["x"]}, "b": {"models": ["y"]}}, "several parts of a model are merged in several ways. "),
        ({"a": {}}, "recipe: modules: each needs either slices or models"), ([], "modules has to be a mapping"),
        ({"a": {"slice": []}}, "recipe: modules: a: unknown field 'slice'. Did you mean 'slices'?"),
        ({"a": {"models": ["x"], "parameters": 3}}, "modules: parameters: has to be a mapping"),
    ],
)  # fmt: skip
def test_modules_that_cannot_be_are_refused_once(modules: Any, message: str) -> None:
    (said,) = refusals({"modules": modules})
    assert message in said


@pytest.mark.parametrize(
    ("value", "source"),
    [
        ("a", "a"), (Path("a"), "a"), ({"path": "a"}, "a"), ({"model": {"path": "a"}}, "a"), ({"model": "a"}, "a"),
        ({"model": {"path": "a", "revision": "v2"}}, "a@v2"), ({"model": {"path": "a", "revision": None}}, "a"),
        ({"model": {"path": "a"}, "lora": {"path": "b"}}, "a+b"), ({"model": "a", "lora": None}, "a"),
        ({"model": {"path": "a"}, "lora": "b", "override_architecture": None}, "a+b"),
        ({"model": {"folder": "a"}}, None), ({"lora": "b", "modle": "a"}, None), ({}, None), (3, None), ("", None),
        ({"model": {"path": ""}}, None),
    ],
)  # fmt: skip
def test_a_model_as_a_mapping(value: Any, source: str | None) -> None:
    assert source_of(value, "here") == source


def test_models_as_mappings_wherever_a_model_is_named() -> None:
    found = read_recipe(
        {
            "merge_method": "ties",
            "base_model": {"model": {"path": "o", "revision": "v1"}},
            "template": {"path": "t"},
            "models": [{"model": {"model": {"path": "a"}, "lora": {"path": "b"}}, "parameters": {"weight": 1}}],
        }
    )
    assert (found.base_model, found.template, found.models[0].model) == ("o@v1", "t", "a+b")
    (said,) = refusals({"models": [{"model": {"model": "a", "override_architecture": "LlamaForCausalLM"}}]})
    assert said.startswith(
        "recipe: models[0]: override_architecture is not supported. Families are told by config.json"
    )


def test_the_dtype_of_the_output_is_mergekit_s_out_dtype() -> None:
    plain = {"merge_method": "linear", "models": ["a", "b"]}
    assert read_recipe(plain | {"out_dtype": "bfloat16"}) == read_recipe(plain | {"dtype": "bfloat16"})
    assert read_recipe(plain | {"out_dtype": "bfloat16"}).notes == ()
    both = read_recipe(plain | {"dtype": "float32", "out_dtype": "bfloat16"})
    assert both.dtype == "bfloat16"
    assert both.notes == ("the output is bfloat16, by out_dtype; the arithmetic is float32 whatever dtype says",)
    (told,) = read_recipe(plain | {"dtype": "bfloat16", "out_dtype": "float32"}).notes
    assert told.endswith("whatever dtype says, where mergekit first rounds the models to bfloat16")


def test_a_recipe_may_have_a_name() -> None:
    found = read_recipe({"merge_method": "linear", "models": ["a", "b"], "name": "first"})
    assert found.name == "first"
    assert read_recipe(recipe_dict(found)) == found
