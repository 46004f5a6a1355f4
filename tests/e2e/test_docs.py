"""The documents that lead a reader through the code name files, recipes and tests that are there."""

from __future__ import annotations

import re

import pytest

from paths import ROOT

CODE = re.compile(r"`((?:[a-z_0-9]+/)*[a-z_0-9]+\.py)(?:::(\w+))?`")
RECIPE = re.compile(r"`(recipes/[^`]+\.yaml)`")
FOLDERS = (ROOT / "src" / "polymerge", ROOT / "tests", ROOT, ROOT / "benchmarks" / "reliability")


@pytest.mark.parametrize("document", ["architecture.md", "papers.md", "reliability.md"])
def test_what_a_document_names_is_there(document: str) -> None:
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    named = CODE.findall(text)
    assert len(named) > 20
    for file, name in named:
        found = [folder / file for folder in FOLDERS if (folder / file).is_file()]
        assert found, f"{document} names {file}"
        if name:
            assert f"def {name}(" in found[0].read_text(encoding="utf-8"), f"{document} names {file}::{name}"
    for recipe in RECIPE.findall(text):
        assert (ROOT / recipe).is_file(), f"{document} names {recipe}"


def test_every_method_and_every_ready_recipe_is_in_the_list_of_papers() -> None:
    from polymerge.methods.table import METHODS

    text = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    assert [name for name in METHODS if f"| `{name}` |" not in text] == []
