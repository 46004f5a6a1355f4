"""Reading recipes: every field, every way to get it wrong, and what is said about it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from polymerge.errors import PolymergeError, RecipeError, Refused, collecting
from polymerge.recipe.parsing import parse_recipe, read_recipe
from polymerge.recipe.recipe import ModelEntry, Override, Recipe, recipe_dict

MINIMAL: dict[str, Any] = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}

FULL = """
merge_method: ties
template: vlm
base_model: base
models:
  - model: vlm
    parameters: {weight: 0.9}
  - model: org/llm@main
    parameters: {weight: 0.1, density: 0.5}
    family: llama
parameters: {density: 0.2, int8_mask: true, lambda: 1.5}
parts: [text, vision]
exclude: [text.embed_tokens.weight, "*.bias"]
overrides:
  - layers: 0-5
    merge_method: copy
  - match: "text.layers.*.mlp.*"
    parameters: {density: [0.1, 0.3]}
  - layers: 7
    match: "*.q_proj.weight"
    merge_method: linear
vocab: overlap
dtype: bfloat16
seed: 7
"""


def problems(recipe: Any) -> list[str]:
    """Everything that is wrong with a recipe; all of it is the recipe's fault."""
    with suppress(Refused), collecting() as found:
        parse_recipe(recipe)
    assert all(isinstance(problem, RecipeError) and problem.exit_status == 2 for problem in found)
    return [str(problem) for problem in found]


# --- what is right


def test_every_field_is_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(FULL, encoding="utf-8")
    assert read_recipe(tmp_path / "recipe.yaml") == Recipe(
        merge_method="ties",
        template="vlm",
        base_model="base",
        models=(
            ModelEntry("vlm", {"weight": 0.9}),
            ModelEntry("org/llm@main", {"weight": 0.1, "density": 0.5}, "llama"),
        ),
        parameters={"density": 0.2, "int8_mask": True, "scale": 1.5},
        parts=("text", "vision"),
        exclude=("text.embed_tokens.weight", "*.bias"),
        overrides=(
            Override((0, 5), merge_method="copy"),
            Override(match="text.layers.*.mlp.*", parameters={"density": [0.1, 0.3]}),
            Override((7, 7), "*.q_proj.weight", "linear"),
        ),
        vocab="overlap",
        dtype="bfloat16",
        seed=7,
    )


def test_what_is_not_said_has_its_default() -> None:
    assert read_recipe(MINIMAL) == Recipe("linear", (ModelEntry("a"), ModelEntry("b")))
    recipe = read_recipe(MINIMAL)
    assert (recipe.template, recipe.base_model, recipe.parts, recipe.dtype) == (None, None, None, None)
    assert (recipe.vocab, recipe.seed, recipe.exclude, recipe.overrides) == ("template", 42, (), ())


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"models": ["a", "b"]}, {}),
        ({"models": [{"model": Path("a")}, {"model": Path("b")}]}, {}),
        ({"parts": "text"}, {"parts": ["text"]}),
        ({"exclude": "*.bias"}, {"exclude": ["*.bias"]}),
        ({"overflow": "*.bias"}, {"overflow": ["*.bias"]}),
        ({"template": Path("a")}, {"template": "a"}),
        ({"parts": None, "exclude": None, "overrides": None, "dtype": None, "parameters": None}, {}),
        ({"overrides": [{"layers": " 3 - 4 "}]}, {"overrides": [{"layers": "3-4"}]}),
        ({"overrides": [{"layers": "3"}]}, {"overrides": [{"layers": 3}]}),
        ({"overrides": [{"layers": 3, "merge_method": None}]}, {"overrides": [{"layers": "3-3"}]}),
    ],
)
def test_short_forms_mean_the_same(short: dict[str, Any], long: dict[str, Any]) -> None:
    assert read_recipe(MINIMAL | short) == read_recipe(MINIMAL | long)


words = st.text("abcxyz/.*-_@", min_size=1, max_size=8)
numbers = st.floats(-10, 10) | st.integers(-5, 5)
said = st.dictionaries(st.sampled_from(["weight", "density", "scale", "int8_mask"]), numbers, max_size=3)
spans = st.tuples(st.integers(0, 99), st.integers(0, 99)).map(lambda pair: (min(pair), max(pair)))
override = st.builds(
    Override, st.none() | spans, words, st.none() | st.sampled_from(["linear", "copy"]),
    said | st.fixed_dictionaries({"density": st.lists(numbers, max_size=3)}),
)  # fmt: skip


@given(
    st.builds(
        Recipe,
        merge_method=st.sampled_from(["linear", "ties", "dare_ties", "slerp"]),
        models=st.lists(st.builds(ModelEntry, words, said, st.none() | words), min_size=1, max_size=3).map(tuple),
        template=st.none() | words,
        base_model=st.none() | words,
        parameters=said,
        parts=st.none() | st.lists(st.sampled_from(["text", "vision", "audio"]), min_size=1, max_size=2).map(tuple),
        exclude=st.lists(words, max_size=2).map(tuple),
        overflow=st.lists(words, max_size=2).map(tuple),
        overrides=st.lists(override, max_size=2).map(tuple),
        vocab=st.sampled_from(["template", "overlap"]),
        dtype=st.none() | st.sampled_from(["float32", "bfloat16"]),
        seed=st.integers(0, 2**64),
    )
)
def test_a_recipe_is_read_back_as_it_was_written(recipe: Recipe) -> None:
    assert read_recipe(recipe_dict(recipe)) == recipe
    assert read_recipe(yaml.safe_load(yaml.safe_dump(recipe_dict(recipe)))) == recipe


# --- what is wrong, field by field


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": []}, "recipe: unknown field 'model' is not supported. Did you mean 'models'?"),
        ({"wieghts": 1}, "recipe: unknown field 'wieghts' is not supported. Known: base_model, branches, calibrate, "),
        ({3: 1}, "recipe: unknown field '3' is not supported."),
        ({"slices": []}, "recipe: models and slices cannot stand side by side; say one of them"),
        ({"modules": {}}, "recipe: models and modules cannot stand side by side; say one of them"),
        ({"tokenizer_source": "union"}, "recipe: mergekit's field 'tokenizer_source' is not supported. The output"),
        ({"tokenizer": {}}, "recipe: mergekit's field 'tokenizer' is not supported. The output always has"),
        ({"chat_template": "auto"}, "recipe: mergekit's field 'chat_template' is not supported. The output has"),
        ({"out_dtype": "half"}, "recipe: out_dtype: cannot merge to 'half'."),
        ({"name": "a/b"}, "recipe: name has to be one that a folder can have, without + and @, got 'a/b'"),
        ({"name": ".."}, "recipe: name has to be one that a folder can have, without + and @, got '..'"),
        ({"name": "a+b"}, "recipe: name has to be one that a folder can have, without + and @, got 'a+b'"),
        ({"layers": "0-5"}, "recipe: layers has to be the number of the text tower's layers, got '0-5'"),
        ({"merge_method": None}, "recipe: merge_method is missing. Known: "),
        ({"merge_method": "tie"}, "recipe: merge_method: there is no method 'tie'. Did you mean 'ties'?"),
        ({"merge_method": ["ties"]}, "recipe: merge_method: there is no method '['ties']'."),
        ({"models": None}, "recipe: models has to be a list of at least one entry `- model: FOLDER`"),
        ({"models": []}, "recipe: models has to be a list of at least one entry"),
        ({"models": {"model": "a"}}, "recipe: models has to be a list of at least one entry"),
        ({"models": ["a", 3]}, "recipe: models[1]: needs `model: FOLDER`, got a number"),
        ({"models": ["a", None]}, "recipe: models[1]: needs `model: FOLDER`, got nothing"),
        ({"models": ["a", {"model": {"paths": "b"}}]}, "recipe: models[1]: needs `model: FOLDER`, got a mapping"),
        ({"models": ["a", ""]}, "recipe: models[1]: needs `model: FOLDER`, got a mapping"),
        ({"models": [{"path": "a"}]}, "recipe: models[0]: needs `model: FOLDER`, got a mapping"),
        ({"models": [{"model": "a", "weight": 1}]}, "recipe: models[0]: unknown field 'weight'. Known: family, "),
        ({"models": [{"model": "a", "parameter": 1}]}, "unknown field 'parameter'. Did you mean 'parameters'?"),
        ({"models": [{"model": "a", "family": 3}]}, "recipe: models[0]: family has to be a name, got a number"),
        ({"template": 3}, "recipe: template has to be a folder or a hub id, got a number"),
        ({"template": ""}, "recipe: template has to be a folder or a hub id, got nothing"),
        ({"base_model": ["a"]}, "recipe: base_model has to be a folder or a hub id, got a list"),
        ({"parts": 3}, "recipe: parts has to be a list out of text, vision, projector, audio; got a number"),
        ({"parts": []}, "recipe: parts has to be a list out of text, vision, projector, audio; got a list"),
        ({"parts": ["txt"]}, "recipe: parts: there is no part 'txt'. Did you mean 'text'?"),
        ({"exclude": {"a": 1}}, "recipe: exclude has to be a list of globs on canonical names, got a mapping"),
        ({"exclude": ["a", 3]}, "recipe: exclude has to be a list of globs on canonical names, got a list"),
        ({"overrides": {"layers": 1}}, "recipe: overrides has to be a list, got a mapping"),
        ({"overrides": ["copy"]}, "recipe: overrides[0]: has to be a mapping, got a text"),
        ({"overrides": [{"match": "a", "method": "x"}]}, "overrides[0]: unknown field 'method'. Did you mean 'me"),
        (
        {"overrides": [{"match": 3}]},
        "recipe: overrides[0]: match has to be a glob on canonical names, got a number",
    ),
        ({"overrides": [{"merge_method": "copy"}]}, "recipe: overrides[0]: has neither layers nor match"),
        ({"overrides": [{"layers": None, "merge_method": "copy"}]}, "recipe: overrides[0]: has neither layers nor "),
        ({"overrides": [{"match": "a", "merge_method": "cpy"}]}, "overrides[0]: there is no method 'cpy'. Did you"),
        ({"overrides": [{"match": "a", "parameters": 3}]}, "overrides[0]: parameters: has to be a mapping of names"),
        ({"overrides": [{"layers": "0:5"}]}, "overrides[0]: layers has to be a layer or an inclusive range"),
        ({"overrides": [{"layers": "-1"}]}, "recipe: overrides[0]: layers has to be a layer or an inclusive range"),
        ({"overrides": [{"layers": 1.5}]}, "recipe: overrides[0]: layers has to be a layer or an inclusive range"),
        ({"overrides": [{"layers": True}]}, "recipe: overrides[0]: layers has to be a layer or an inclusive range"),
        ({"overrides": [{"layers": [0, 5]}]}, "recipe: overrides[0]: layers has to be a layer or an inclusive range"),
        ({"overrides": [{"layers": "5-0"}]}, "recipe: overrides[0]: layers 5-0 ends before it starts"),
        ({"branches": "both"}, "recipe: branches has to be fill or retain, got 'both'"),
        ({"vocab": "union"}, "recipe: vocab has to be template, overlap or by-token, got 'union'"),
        ({"vocab": None}, "recipe: vocab has to be template, overlap or by-token, got 'None'"),
        ({"dtype": "bf16"}, "recipe: dtype: cannot merge to 'bf16'. Did you mean 'bfloat16'?"),
        ({"dtype": "int8"}, "recipe: dtype: cannot merge to 'int8'. Known: bfloat16, float16, float32, float64."),
        ({"dtype": ["float32"]}, "recipe: dtype: cannot merge to '['float32']'."),
        ({"seed": -1}, "recipe: seed has to be an integer from 0, got '-1'"),
        ({"seed": 1.0}, "recipe: seed has to be an integer from 0, got '1.0'"),
        ({"seed": True}, "recipe: seed has to be an integer from 0, got 'True'"),
        ({"seed": None}, "recipe: seed has to be an integer from 0, got 'None'"),
        ({"parameters": ["scale"]}, "recipe: parameters: has to be a mapping of names to values, got '['scale']'"),
        ({"parameters": {"densty": 1}}, "recipe: parameters: no method has a parameter 'densty'. Did you mean 'd"),
    ],
)  # fmt: skip
def test_each_mistake_is_one_problem_that_names_it(fields: dict[Any, Any], message: str) -> None:
    (problem,) = problems(MINIMAL | fields)
    assert message in problem


def test_all_mistakes_are_said_at_once() -> None:
    wrong = {"merge_method": "tise", "models": [3], "parts": ["ears"], "seed": "x", "dtpye": "float32", "vocab": 1}
    with pytest.raises(Refused) as refused:
        read_recipe(wrong)
    assert len(refused.value.problems) == 6
    assert refused.value.exit_status == 2
    text = str(refused.value)
    assert text.startswith("6 problems, nothing was written:\n  1. recipe: unknown field 'dtpye'")
    for mistake in ("'tise'", "models[0]", "'ears'", "'x'", "'dtpye'", "'1'"):
        assert mistake in text


# --- files


def refused_file(path: Path) -> str:
    with pytest.raises(PolymergeError) as caught:
        read_recipe(path)
    assert caught.value.exit_status == 2
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a recipe has to be a mapping of fields, got nothing"),
        ("- a", "a recipe has to be a mapping of fields, got a list"),
        ("ties", "a recipe has to be a mapping of fields, got a text"),
        ("a: [", "invalid YAML"),
        ("a: b: c", "invalid YAML: mapping values are not allowed here"),
        ("? [1, 2]\n: 3", "invalid YAML"),
        ("a: !!python/object:os.system {}", "invalid YAML"),
        ("a: 2024-13-01", "invalid YAML: month must be in 1..12"),
        ("[" * 5000, "invalid YAML"),
        ("seed: 1\nmerge_method: ties\nseed: 2", "'seed' is written twice"),
        ("models:\n- {model: a, model: b}", "'model' is written twice"),
        ("parameters: {scale: 1, 'scale': 2}", "'scale' is written twice"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    assert message in refused_file(tmp_path / "recipe.yaml")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    assert "invalid YAML" in refused_file(tmp_path / "recipe.yaml")
    assert "cannot be read: Is a directory" in refused_file(tmp_path)


def test_a_missing_file_is_refused_with_what_lies_beside_it(tmp_path: Path) -> None:
    assert refused_file(tmp_path / "recipe.yaml").endswith("no such recipe.")
    (tmp_path / "recipes.yml").write_text("{}", encoding="utf-8")
    assert refused_file(tmp_path / "recipe.yaml").endswith("Did you mean 'recipes.yml'?")
    assert "no such recipe" in refused_file(tmp_path / "recipes.yml" / "recipe.yaml")
    assert "no such recipe" in refused_file(tmp_path / "nowhere" / "recipe.yaml")


def test_anchors_and_merge_keys_of_yaml_work(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "merge_method: linear\nmodels:\n- &one {model: a, parameters: {weight: 1}}\n- {<<: *one, model: b}\n",
        encoding="utf-8",
    )
    assert read_recipe(tmp_path / "recipe.yaml").models == (
        ModelEntry("a", {"weight": 1}),
        ModelEntry("b", {"weight": 1}),
    )


def test_a_space_is_not_a_method_and_the_way_to_it_is_told() -> None:
    with pytest.raises(
        Refused, match=r"there is no method 'knots'. It is a space for merging adapters.* parameters: {space: knots}"
    ):
        read_recipe({"merge_method": "knots", "models": ["a", "b"]})
