"""Recipes of several stages: how they are written, in which order they are merged, and what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from polymerge.errors import Refused
from polymerge.recipe.parsing import read_recipe
from polymerge.recipe.recipe import Recipe, recipe_dict


def stage(name: str | None, *models: str, **more: Any) -> dict[str, Any]:
    named = {} if name is None else {"name": name}
    return {**named, "merge_method": "linear", "models": list(models), "parameters": {"weight": 1}, **more}


def names(recipe: Recipe) -> list[str | None]:
    return [*(one.name for one in recipe.stages), recipe.name]


def refusals(*stages: Any) -> list[str]:
    with pytest.raises(Refused) as refused:
        read_recipe({"stages": list(stages)})
    return list(map(str, refused.value.problems))


FIRST, SECOND, LAST = stage("first", "a", "b"), stage("second", "first", "c"), stage(None, "second", "a")


def test_documents_and_stages_are_the_same_recipe(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("---\n" + yaml.safe_dump_all([FIRST, SECOND, LAST, None]))
    found = read_recipe(file)
    assert names(found) == ["first", "second", None]
    assert found == read_recipe({"stages": [FIRST, SECOND, LAST]})
    assert found == read_recipe({"stages": [FIRST, SECOND], **LAST})
    assert found.stages[0] == read_recipe(FIRST)
    assert read_recipe(yaml.safe_load(yaml.safe_dump(recipe_dict(found)))) == found


def test_the_order_is_that_of_need_and_the_output_has_no_name_or_comes_last() -> None:
    assert names(read_recipe({"stages": [LAST, SECOND, FIRST]})) == ["first", "second", None]
    assert names(read_recipe({"stages": [SECOND | {"name": "out"}, FIRST]})) == ["first"]
    assert names(read_recipe({"stages": [FIRST, SECOND]})) == ["first", "second"]
    assert names(read_recipe({"stages": [FIRST]})) == ["first"]


@pytest.mark.parametrize("field", ["base_model", "template"])
def test_a_stage_may_be_named_wherever_a_model_is(field: str) -> None:
    assert names(read_recipe({"stages": [FIRST, stage(None, "a", "b", **{field: "first"})]})) == ["first", None]


def test_a_stage_that_none_names_is_left_out_and_that_is_said() -> None:
    found = read_recipe({"stages": [FIRST, stage("idle", "a", "b"), SECOND]})
    assert names(found) == ["first", "second"]
    assert found.notes == ("stage 'idle' is left out: no other names it",)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([stage(None, "a"), stage(None, "b")], "recipe: stage 2 of 2 needs a `name`, by which another can name it"),
        ([FIRST, FIRST, SECOND], "recipe: two stages have the name 'first'"),
        ([stage("a", "b"), stage("b", "a")], "recipe: stages in a circle: 'b' needs 'a' needs 'b'"),
        ([FIRST, stage("x", "x")], "recipe: stages in a circle: 'x' needs 'x'"),
        ([stage("x", "y"), stage("y", "z"), stage("z", "y"), stage(None, "x")], "circle: 'y' needs 'z' needs 'y'"),
        ([FIRST, stage(None, "frist")], "'frist': there is no such folder or stage. Did you mean 'first'?"),
        ([FIRST, stage(None, "first+ADAPTER")], "'first+ADAPTER': an adapter cannot be folded into a stage. Fold it"),
        ([FIRST, stage(None, "first", dtype="half")], "stage 2: recipe: dtype: cannot merge to 'half'."),
        ([stage("first", "a", merge_method="tie"), SECOND], "stage 'first': recipe: merge_method: there is no method"),
        ([FIRST, 3], "stage 2: has to be a mapping of fields, got a number"),
        ([3], "recipe: stages: has to be a list of mappings of fields, got a number"),
        ([FIRST, {"stages": [FIRST], "name": "inner"}], "stage 'inner': stages inside a stage. List them one after"),
        ([], "recipe: stages has to be a list of recipes, of which later ones name earlier ones by `name`"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_stages_is_said_once(stages: list[Any], message: str) -> None:
    (said,) = refusals(*stages)
    assert message in said


def test_what_is_wrong_in_each_stage_is_said_at_once() -> None:
    assert [said.partition(":")[0] for said in refusals(FIRST | {"seed": -1}, SECOND | {"vocab": "x"})] == [
        "stage 'first'", "stage 'second'",
    ]  # fmt: skip
