"""What a recipe says of the output's tokenizer and chat template, in mergekit's words."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from polymerge.errors import PolymergeError
from polymerge.recipe.parsing import read_recipe
from polymerge.recipe.recipe import Recipe, recipe_dict
from running import recipe_file

MINIMAL: dict[str, Any] = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]}
JINJA = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def problems(fields: dict[str, Any]) -> list[str]:
    with pytest.raises(PolymergeError) as refused:
        read_recipe(MINIMAL | fields)
    return [str(problem) for problem in refused.value.problems]


@pytest.mark.parametrize(
    ("fields", "source"),
    [
        ({"tokenizer_source": "base"}, "base"),
        ({"tokenizer_source": "union"}, "union"),
        ({"tokenizer_source": "some/model"}, "some/model"),
        ({"tokenizer": {"source": "base"}}, "base"),
        ({"tokenizer": {"source": "some/model", "tokens": None}}, "some/model"),
        ({"tokenizer": {}}, "union"),
        ({"tokenizer_source": {"model": {"path": "some/model", "revision": "v1"}}}, "some/model@v1"),
        ({"tokenizer": None, "tokenizer_source": None}, None),
        ({"tokenizer_source": "base", "vocab": "template"}, "base"),
    ],
)
def test_both_of_mergekit_s_fields_are_one(fields: dict[str, Any], source: str | None) -> None:
    recipe = read_recipe(MINIMAL | fields)
    assert recipe.tokenizer_source == source
    assert read_recipe(recipe_dict(recipe)) == recipe
    assert ("tokenizer_source" in recipe_dict(recipe)) == (source is not None)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"tokenizer": {"tokens": {"<a>": {"source": "b"}}}},
            "recipe: tokenizer: mergekit's field 'tokens' is not",
        ),
        ({"tokenizer": {"pad_to_multiple_of": 8}}, "recipe: tokenizer: mergekit's field 'pad_to_multiple_of' is not"),
        ({"tokenizer": {"souce": "base"}}, "recipe: tokenizer: unknown field 'souce'. It holds `source`."),
        ({"tokenizer": "union"}, "recipe: tokenizer has to be a mapping with `source`, got 'union'"),
        ({"tokenizer": {"source": "base"}, "tokenizer_source": "base"}, "recipe: tokenizer_source and tokenizer say"),
        ({"tokenizer_source": 3}, "recipe: tokenizer_source has to be base, union or one of the models, got '3'"),
        ({"tokenizer": {"source": ""}}, "recipe: tokenizer: source has to be base, union or one of the models, got ''"),
        ({"tokenizer_source": "base", "vocab": "by-token"}, "recipe: tokenizer_source and vocab: by-token say differ"),
        ({"chat_template": 3}, "recipe: chat_template has to be auto, a file, or a template in Jinja, got '3'"),
        ({"chat_template": "chatml"}, "recipe: chat_template: mergekit's named template 'chatml' is not supported"),
        ({"chat_template": "no such file"}, "no such file: cannot be read: No such file or directory"),
        ({"chat_template": "{% for one in all %}"}, "recipe: chat_template: is no chat template in Jinja: line 1: Une"),
        ({"chat_template": "a\\nb\n"}, "recipe: chat_template: is no chat template in Jinja: nothing in it stands for"),
    ],
)
def test_each_mistake_is_one_problem(fields: dict[str, Any], said: str) -> None:
    (problem,) = problems(fields)
    assert problem.startswith(said)


def test_all_that_is_wrong_is_said() -> None:
    assert len(problems({"tokenizer": {"tokens": {}, "force": 1, "pad_to_multiple_of": 8}, "chat_template": 1})) == 4


@pytest.mark.parametrize("text", [JINJA, "auto", None, "{{ messages }}"])
def test_a_chat_template_is_what_it_says(text: str | None) -> None:
    recipe = read_recipe(MINIMAL | {"chat_template": text})
    assert recipe.chat_template == text
    assert read_recipe(recipe_dict(recipe)) == recipe


def test_transformers_own_tags_are_jinja() -> None:
    text = "{% for x in y %}{% generation %}{{ x }}{% endgeneration %}{% if x %}{% break %}{% endif %}{% endfor %}"
    assert read_recipe(MINIMAL | {"chat_template": text}).chat_template == text
    with pytest.raises(PolymergeError, match="is no chat template in Jinja"):
        read_recipe(MINIMAL | {"chat_template": text.replace("{% endgeneration %}", "")})


def test_a_file_is_looked_for_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/chat.jinja").write_text(JINJA, encoding="utf-8")
    file = recipe_file(MINIMAL | {"chat_template": "chat.jinja"}, tmp_path / "recipes/recipe.yaml")
    assert read_recipe(file).chat_template == JINJA
    monkeypatch.chdir(tmp_path)
    assert read_recipe(MINIMAL | {"chat_template": "recipes/chat.jinja"}).chat_template == JINJA
    (tmp_path / "recipes/chat.jinja").write_text("{{ unfinished", encoding="utf-8")
    with pytest.raises(PolymergeError, match=r"chat.jinja: is no chat template in Jinja: line 1"):
        read_recipe(file)
    (tmp_path / "recipes/chat.jinja").write_bytes(b"\xff{{ x }}")
    with pytest.raises(PolymergeError, match="not UTF-8"):
        read_recipe(file)


def test_without_jinja2_its_syntax_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert read_recipe(MINIMAL | {"chat_template": "{% for"}).chat_template == "{% for"


def test_one_made_in_python_is_checked() -> None:
    made = Recipe("linear", read_recipe(MINIMAL).models, tokenizer_source="union", chat_template="{% for")
    with pytest.raises(PolymergeError, match="is no chat template in Jinja"):
        read_recipe(made)
