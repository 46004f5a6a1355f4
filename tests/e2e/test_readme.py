"""The README, the tables of the docs and the ready recipes say what the code does."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from paths import ROOT
from polymerge import read_recipe
from polymerge.families import FAMILIES
from polymerge.methods.method import Parameter
from polymerge.methods.table import ADAPTERS, METHODS

README, RECIPE, FAMILIES_PAGE, ADAPTERS_PAGE = (
    (ROOT / page).read_text(encoding="utf-8")
    for page in ("README.md", "docs/recipe.md", "docs/families.md", "docs/merging-adapters.md")
)
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PAPERS = {
    "brv": "# Bring Reason to Vision (ICML 2025)",
    "adamms": "# AdaMMS (CVPR 2025)",
    "robustmerge": "# RobustMerge (NeurIPS 2025)",
}
OF_PAPERS = [path for path in RECIPES if path.stem.split("-")[0] in PAPERS]


def shown(parameter: Parameter) -> str:
    default = parameter.default
    if default is None:
        return parameter.name
    word = f"{default:g}" if isinstance(default, float) else str(default).lower()
    return f"{parameter.name} [{word}]"


@pytest.mark.parametrize("row", METHODS.values(), ids=METHODS)
def test_the_table_of_methods_has_every_row(row) -> None:
    parameters = ", ".join(map(shown, row.parameters))
    assert f"| `{row.name}` | {row.title} | {parameters} | {row.source} |" in RECIPE
    assert f"| `{row.name}` | {row.title} |" in README


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_table_of_families_has_every_row(family) -> None:
    assert f"| `{family.name}` | {family.title} | {family.source} |" in FAMILIES_PAGE


@pytest.mark.parametrize("path", OF_PAPERS, ids=lambda path: path.stem)
def test_a_ready_recipe_of_a_paper_is_understood_and_says_where_it_is_from(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.template == recipe.models[0].model
    assert path.read_text(encoding="utf-8").startswith(PAPERS[path.stem.split("-")[0]])


@pytest.mark.parametrize("parameter", ADAPTERS, ids=lambda parameter: parameter.name)
def test_the_parameters_of_adapters_are_told(parameter) -> None:
    assert f"`{shown(parameter)}`" in ADAPTERS_PAGE


def test_there_is_a_recipe_for_each_mode_of_the_paper_s_code() -> None:
    read = [read_recipe(path) for path in RECIPES if path.stem.startswith("brv")]
    methods = {recipe.merge_method for recipe in read}
    assert methods == {"linear", "ties", "dare_linear", "dare_ties", "task_arithmetic"}
    assert any(override.merge_method == "copy" for recipe in read for override in recipe.overrides)


def test_the_recipe_in_the_readme_runs_on_what_the_project_ships(tmp_path, monkeypatch) -> None:
    from polymerge import merge

    text = README.split("```yaml\n")[1].split("```")[0]
    monkeypatch.chdir(ROOT)
    merged = merge(yaml.safe_load(text), tmp_path / "merged")
    assert merged.verification is not None
    assert merged.verification.passed
    assert merged.plan.counts()["merged"] > 0
