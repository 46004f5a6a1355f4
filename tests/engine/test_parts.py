"""Fine-tunes of one VLM in all parts, each part with weights of its own: bit for bit what the recipe says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from paths import ROOT
from polymerge.families import family_of, splits
from polymerge.families.resolve import map_names
from running import cli, merged, raw, recipe_file
from tiny import build, family_in, generate, load, perturbed
from tiny_configs import CLASSLESS, RUNNABLE, VLMS

FAMILIES = ("llava_next", "qwen2_vl", "internvl", *(family for family in CLASSLESS if family in VLMS))
GENERAL = (0.8, 0.2)


def recipe(model: Path, tuned: Path, *, parts: list[str] | None, overrides: list[dict[str, Any]]) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "merge_method": "linear",
        "template": str(model),
        "models": [
            {"model": str(folder), "parameters": {"weight": weight}}
            for folder, weight in zip((model, tuned), GENERAL, strict=True)
        ],
        "overrides": overrides,
    }
    return asked | ({"parts": parts} if parts else {})


def override(match: str, *weights: float) -> dict[str, Any]:
    return {"match": match, "parameters": {"weight": list(weights)}}


def average(one: Tensor, other: Tensor, weights: tuple[float, float]) -> Tensor:
    """In float32, in the models' order, rounded once."""
    return (weights[0] * one.float() + weights[1] * other.float()).to(one.dtype)


def canonical_names(folder: Path) -> dict[str, str]:
    """By its name on disk, the canonical name of each tensor that may be merged."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layout = map_names(family_of(config), load(folder), "here", splits(config)).layout
    return {own: blocks[0][0] for own, blocks in layout.items()}


def check(out: Path, model: Path, tuned: Path, weights_of: dict[str, tuple[float, float] | None]) -> None:
    """Each tensor is the literal merge by the weights of the first prefix it has, or the template's to the byte."""
    ours, theirs, found = load(model), load(tuned), load(out)
    before, after = raw(model), raw(out)
    names = canonical_names(model)
    assert found.keys() == ours.keys()
    seen = set()
    for own, tensor in ours.items():
        prefix = next((prefix for prefix in weights_of if names.get(own, "").startswith(prefix)), None)
        weights = weights_of[prefix] if prefix is not None else None
        if weights is None:
            assert after[own] == before[own], own
        else:
            assert found[own].dtype == tensor.dtype
            assert torch.equal(found[own], average(tensor, theirs[own], weights)), own
            assert after[own] != before[own], own
        seen.add(prefix)
    assert set(weights_of) <= seen, "a part without tensors shows nothing"


@pytest.fixture(scope="module", params=FAMILIES)
def fine_tunes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    model = build(request.param, folder / "model")
    return model, perturbed(model, folder / "tuned", seed=5, size=0.1)


def test_the_vision_tower_has_weights_of_its_own(fine_tunes: tuple[Path, Path], tmp_path: Path) -> None:
    asked = recipe(*fine_tunes, parts=["text", "vision", "projector"], overrides=[override("vision.*", 0.5, 0.5)])
    out = merged(asked, tmp_path / "out")
    check(out, *fine_tunes, {"vision.": (0.5, 0.5), "text.": GENERAL, "projector.": GENERAL})
    assert raw(out) == raw(merged({**asked, "parts": None}, tmp_path / "by default"))
    if family_in(out) in RUNNABLE:
        assert not torch.equal(generate(out, tokens=1), generate(fine_tunes[0], tokens=1))


def test_the_recipe_in_the_documentation_is_that_one(fine_tunes: tuple[Path, Path]) -> None:
    document = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    shown = yaml.safe_load(document.split("## Fine-tunes of one VLM")[1].split("```yaml\n")[1].split("```")[0])
    model, tuned = fine_tunes
    places = {"./vlm-charts": str(model), "./vlm-medical": str(tuned)}
    shown["template"] = places[shown["template"]]
    shown["models"] = [{**entry, "model": places[entry["model"]]} for entry in shown["models"]]
    assert shown == recipe(
        *fine_tunes, parts=["text", "vision", "projector"], overrides=[override("vision.*", 0.5, 0.5)]
    )


def test_every_part_has_weights_of_its_own(fine_tunes: tuple[Path, Path], tmp_path: Path) -> None:
    overrides = [override("projector.*", 0.25, 0.75), override("vision.*", 0.5, 0.5)]
    out = merged(recipe(*fine_tunes, parts=None, overrides=overrides), tmp_path / "out")
    check(out, *fine_tunes, {"projector.": (0.25, 0.75), "vision.": (0.5, 0.5), "text.": GENERAL})


@pytest.mark.parametrize("kept", ["text", "vision", "projector"])
def test_a_part_that_is_not_named_is_not_touched(kept: str, fine_tunes: tuple[Path, Path], tmp_path: Path) -> None:
    parts = [part for part in ("text", "vision", "projector") if part != kept]
    out = merged(recipe(*fine_tunes, parts=parts, overrides=[]), tmp_path / "out", "--no-verify")
    check(out, *fine_tunes, {**{f"{part}.": GENERAL for part in parts}, f"{kept}.": None})


def test_the_first_override_that_matches_wins(fine_tunes: tuple[Path, Path], tmp_path: Path) -> None:
    """One layer of the text tower, the head kept, and the rest of the text by weights of their own."""
    overrides: list[dict[str, Any]] = [
        {"match": "text.lm_head.weight", "merge_method": "copy"},
        {"layers": "1", "parameters": {"weight": [0.0, 1.0]}},
        override("text.*", 0.5, 0.5),
    ]
    out = merged(recipe(*fine_tunes, parts=None, overrides=overrides), tmp_path / "out", "--no-verify")
    check(
        out,
        *fine_tunes,
        {
            "text.lm_head.": None,
            "text.layers.1.": (0.0, 1.0),
            "text.": (0.5, 0.5),
            "vision.": GENERAL,
            "projector.": GENERAL,
        },
    )


def test_deltas_have_weights_per_part_too(fine_tunes: tuple[Path, Path], tmp_path: Path) -> None:
    model, tuned = fine_tunes
    asked = {
        "merge_method": "task_arithmetic",
        "base_model": str(model),
        "models": [{"model": str(tuned), "parameters": {"weight": 1.0}}],
        "overrides": [override("vision.*", 0.5), override("projector.*", 0.0)],
        "dtype": "float32",
    }
    found, ours, theirs = load(merged(asked, tmp_path / "out", "--no-verify")), load(model), load(tuned)
    share = {"vision": 0.5, "projector": 0.0, "text": 1.0}
    for own, canonical in canonical_names(model).items():
        step = theirs[own].float() - ours[own].float()
        wanted = ours[own].float() + share[canonical.partition(".")[0]] * step
        assert torch.equal(found[own], wanted), own


def test_the_plan_says_the_weights_of_each_part(fine_tunes: tuple[Path, Path], tmp_path: Path) -> None:
    asked = recipe(*fine_tunes, parts=["text", "vision", "projector"], overrides=[override("vision.*", 0.5, 0.5)])
    made = json.loads(cli("plan", recipe_file(asked, tmp_path / "recipe.yaml"), "--json", "-").out)
    names = canonical_names(fine_tunes[0])
    for step in made["steps"]:
        if step["fate"] == "merged":
            weights = {tuple(made["settings"][piece["setting"]]["parameters"]["weight"]) for piece in step["pieces"]}
            vision = names[step["name"]].startswith("vision.")
            assert weights == {(0.5, 0.5) if vision else GENERAL}, step["name"]


def test_an_override_that_matches_no_tensor_is_refused(fine_tunes: tuple[Path, Path], tmp_path: Path) -> None:
    asked = recipe(*fine_tunes, parts=None, overrides=[override("visual.*", 0.5, 0.5)])
    ran = cli("plan", recipe_file(asked, tmp_path / "recipe.yaml"))
    assert ran.status == 2
    assert "'visual.*'" in ran.err


def test_as_many_weights_as_models_are_asked_for(fine_tunes: tuple[Path, Path], tmp_path: Path) -> None:
    asked = recipe(*fine_tunes, parts=None, overrides=[override("vision.*", 0.5)])
    ran = cli("plan", recipe_file(asked, tmp_path / "recipe.yaml"))
    assert ran.status == 2
    assert "overrides[0]" in ran.err
