"""mergekit's recipes: the tensors that mergekit makes of them, or a refusal by name, one message for each cause.

Both compute in float32 in another order (mergekit divides a sum where polymerge divides the weights). What they may
differ by is counted against the change that the merge makes: 1e-5 of the norm of what mergekit's tensor differs by from
the base model's, or from the first model's where there is no base.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import polymerge
from paths import GOLDEN
from polymerge.errors import Refused
from running import cli

MERGEKIT = GOLDEN / "mergekit"
MODELS = ("base", "a", "b", "c", "more")
EVERY = sorted(folder.parent.name for folder in MERGEKIT.glob("*/recipe.yml"))
TAKEN = sorted(folder.parent.name for folder in MERGEKIT.glob("*/expected.safetensors"))

TOKENIZER = (
    "is not supported. The output always has the template's tokenizer; vocab says what happens to the embeddings."
)
REFUSED = {
    **{
        f"tokenizer-{name}": [f"recipe: mergekit's field '{field}' {TOKENIZER}"]
        for name, field in (
            ("base", "tokenizer_source"),
            ("model", "tokenizer_source"),
            ("union", "tokenizer_source"),
            ("union-ties", "tokenizer"),
        )
    },
}
IN_FLOAT32 = (
    "karcher", "model_stock", "model_stock-filter", "multislerp", "nuslerp", "linear-slices", "slerp-slices",
)  # fmt: skip
"""Recipes whose merge changes some tensors by so little that mergekit's own float32 is what they differ by: it rounds
angles, and the weighted models (not their deltas) before it adds them. One unit in the last place is allowed beside."""

UNCHANGED = ("arcee_fusion", "slerp-gradient", "slerp-slices")
"""Recipes with tensors that are to be the first model's, bit for bit: their t is 0, or no entry stands out."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models, each of which says its name in its config and in its tokenizer's."""
    folder = tmp_path_factory.mktemp("mergekit")
    for name in MODELS:
        shutil.copytree(MERGEKIT / "models" / name, folder / name)
        for file in (folder / name / "config.json", folder / name / "tokenizer_config.json"):
            file.write_text(json.dumps({**json.loads(file.read_text()), "made_for": name}))
    return folder


def recipe_of(name: str, place: Path) -> dict[str, Any]:
    """A recipe of mergekit's with its models found; all other words are as they are."""
    recipe: dict[str, Any] = yaml.safe_load((MERGEKIT / name / "recipe.yml").read_text())
    if "base_model" in recipe:
        recipe["base_model"] = str(place / recipe["base_model"])
    sources = [source for one in recipe.get("slices", ()) for source in one["sources"]]
    for entry in (*recipe.get("models", ()), *sources):
        entry["model"] = str(place / entry["model"])
    return recipe


def test_the_cases_are_there() -> None:
    assert len(TAKEN) == 39
    assert len(EVERY) == 43


@pytest.mark.parametrize("name", TAKEN)
def test_it_gives_what_mergekit_gives(name: str, place: Path, tmp_path: Path) -> None:
    recipe = recipe_of(name, place)
    merged = polymerge.merge(recipe, tmp_path / "out", check=False)
    ours, theirs = load_file(tmp_path / "out/model.safetensors"), load_file(MERGEKIT / name / "expected.safetensors")
    owner = Path(recipe.get("base_model") or (recipe.get("models") or recipe["slices"][0]["sources"])[0]["model"])
    start = load_file(owner / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for tensor, values in theirs.items():
        change = float((values.float() - start[tensor]).norm())
        assert change > 0 or name in UNCHANGED
        assert ours[tensor].dtype == values.dtype
        rounding = 2.0**-23 * float(values.norm()) if name in IN_FLOAT32 else 0.0
        assert (ours[tensor].float() - values.float()).norm() <= 1e-5 * change + rounding, tensor
    said = json.loads((MERGEKIT / name / "expected.json").read_text())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["vocab_size"], config["dtype"]) == (said["vocab_size"], said["dtype"])
    assert config["made_for"] == owner.name
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["made_for"] == owner.name
    assert {merged.plan.beside[kind] for kind in ("config", "tokenizer")} == {owner.name}


@pytest.mark.parametrize("name", [name for name in EVERY if name not in TAKEN])
def test_what_it_does_not_do_it_refuses_by_name(name: str, place: Path, tmp_path: Path) -> None:
    recipe = recipe_of(name, place)
    with pytest.raises(Refused) as refused:
        polymerge.merge(recipe, tmp_path / "out")
    expected = REFUSED.get(
        name, [f"recipe: merge_method: mergekit's method '{recipe['merge_method']}' is not supported."]
    )
    found = list(map(str, refused.value.problems))
    assert len(found) == len(expected), found
    for one, start in zip(found, expected, strict=True):
        assert one.startswith(start)
    file = tmp_path / "recipe.yml"
    file.write_text(yaml.safe_dump(recipe))
    ran = cli("merge", file, "-o", tmp_path / "out")
    assert (ran.status, ran.out) == (2, "")
    assert not (tmp_path / "out").exists()
