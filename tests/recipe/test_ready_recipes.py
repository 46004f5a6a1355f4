"""The recipes that come with polymerge: each is read, and says where it is from and what is known of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import polymerge
from paths import ROOT
from polymerge.recipe.parsing import read_recipe
from polymerge.recipe.recipe import Recipe, recipe_dict
from tiny import build, perturbed, related_llm

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
OURS = ("optmerge-", "text-tune-", "coder-", "instruct-", "cross-lingual-")
"""Recipes that are planned here on tiny models of the same families."""


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_each_is_read_and_says_where_it_is_from(file: Path) -> None:
    recipe = read_recipe(file)
    assert recipe.models
    assert read_recipe(recipe_dict(recipe)) == recipe
    head = file.read_text(encoding="utf-8").partition("merge_method")[0]
    assert head.startswith("# ")
    if file.name.startswith(OURS):
        assert any(word in head for word in ("arXiv", "ACL 2026", "CVPR", "#48", "optmerge-qwen2-vl.yaml"))
        assert any(word in head for word in ("Known:", "Search", "compare with it first"))


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VLM of each family, with a fine-tune and a language model beside it."""
    folder = tmp_path_factory.mktemp("families")
    for family in ("qwen2_vl", "qwen2_5_vl", "internvl_chat", "llava_next"):
        build(family, folder / family, seed=1)
        perturbed(folder / family, folder / f"{family}-tuned", seed=2)
        related_llm(folder / family, folder / f"{family}-text", seed=3)
    return folder


def on_tiny(recipe: Recipe, families: Path, family: str, place: Path) -> dict[str, object]:
    """The recipe with each of its models in the form of a tiny one, each in a folder of its own."""
    data = recipe_dict(recipe)

    def standing_in(source: str) -> str:
        folder = place / source.replace("/", "--")
        if not folder.exists():
            of_vlm = source == recipe.template or "VL" in source
            kind = "" if source in (recipe.template, recipe.base_model) and of_vlm else "-tuned" if of_vlm else "-text"
            shutil.copytree(families / f"{family}{kind}", folder)
        return str(folder)

    for name in ("template", "base_model"):
        if name in data:
            data[name] = standing_in(data[name])
    return data | {"models": [{**entry, "model": standing_in(entry["model"])} for entry in data["models"]]}


@pytest.mark.parametrize("file", [file for file in RECIPES if file.name.startswith(OURS)], ids=lambda file: file.stem)
def test_each_is_planned_on_models_of_its_families(file: Path, families: Path, tmp_path: Path) -> None:
    recipe = read_recipe(file)
    names = (recipe.template or recipe.base_model or "", file.name)
    family = next(
        family
        for word, family in (("Qwen2-VL", "qwen2_vl"), ("Qwen2.5", "qwen2_5_vl"), ("Qwen3.5", "qwen2_5_vl"),
                             ("InternVL", "internvl_chat"), ("llava", "llava_next"))
        if word in names[0]
    )  # fmt: skip
    plan = polymerge.plan(on_tiny(recipe, families, family, tmp_path))
    merged = {step.canonical for step in plan.steps if step.fate == "merged"}
    assert "text.layers.0.mlp.up_proj.weight" in merged
    assert not any(name.startswith("vision.") for name in merged)
    assert any(name.startswith("projector.") for name in merged) == ("projector" in (recipe.parts or ()))
    assert ("text.embed_tokens.weight" in merged) == ("text.embed_tokens.weight" not in recipe.exclude)
    if recipe.chat_template == "auto":
        assert plan.chat_template
