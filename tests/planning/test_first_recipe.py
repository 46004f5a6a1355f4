"""`polymerge new`: what kind of merge given models make, and a recipe for it that plans."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import yaml

import polymerge
from headers_only import checkpoint, llm, vlm
from paths import ROOT
from polymerge.errors import PolymergeError
from polymerge.methods.table import METHODS
from polymerge.planning import first_recipe
from polymerge.planning.first_recipe import candidates, new_recipe
from running import cli, two_llamas


class Family(NamedTuple):
    """A vision-language model with tokens of its own, a language model, and the base of both."""

    vlm: str
    reason: str
    base: str


@pytest.fixture
def three(tmp_path: Path) -> Family:
    models = vlm(tmp_path / "vlm", vocab=18), llm(tmp_path / "reason"), llm(tmp_path / "base")
    return Family(*map(str, models))


def adapter(folder: Path, rank: int = 2) -> Path:
    """An adapter of one module, as PEFT saves it; headers only."""
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {f"{module}.lora_A.weight": ("F32", (rank, 8)), f"{module}.lora_B.weight": ("F32", (8, rank))}
    checkpoint(folder, None, shapes)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj"],
              "base_model_name_or_path": "owner/base"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_language_model_into_a_vlm(three: Family) -> None:
    made = new_recipe([three.reason, three.vlm])  # the multimodal one is the template, wherever it is named
    recipe = yaml.safe_load(made.text)
    assert recipe["merge_method"] == "linear"
    assert recipe["template"] == three.vlm
    assert [(one["model"], one["parameters"]["weight"]) for one in recipe["models"]] == [
        (three.vlm, 0.9),
        (three.reason, 0.1),
    ]
    assert recipe["parts"] == ["text"]
    assert recipe["exclude"] == ["text.embed_tokens.weight", "text.lm_head.weight"]
    assert polymerge.plan(recipe).hash == made.plan.hash
    assert "Bring Reason to Vision (Chen et al., ICML 2025)" in " ".join(made.text.replace("#", "").split())
    assert made.varied == "weight"


def test_with_their_base_deltas_are_added(three: Family) -> None:
    made = new_recipe([three.vlm, three.reason], base=three.base)
    recipe = yaml.safe_load(made.text)
    assert (recipe["merge_method"], recipe["base_model"]) == ("task_arithmetic", three.base)
    assert [one["parameters"]["weight"] for one in recipe["models"]] == [1.0, 0.3]
    assert made.plan.base is not None
    assert "without" not in made.text


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("kind", ["llm into vlm", "fine-tunes", "architectures"])
def test_each_method_that_people_start_from_plans(kind: str, based: bool, three: Family, tmp_path: Path) -> None:
    """Of every kind: the recipe is YAML, is what was planned, and says where its numbers are from."""
    other = llm(tmp_path / "other") if kind == "fine-tunes" else vlm(tmp_path / "other", without=["image_newline"])
    if kind == "architectures":
        config = json.loads((other / "config.json").read_text())
        said = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
        (other / "config.json").write_text(json.dumps(config | said))
    models = {"llm into vlm": [three.vlm, three.reason], "fine-tunes": [three.reason, str(other)]}
    models["architectures"] = [three.vlm, str(other)]
    base = three.base if based else None
    found = candidates(models[kind], base)
    assert found.kind == kind
    for start in found.starts:
        made = new_recipe(found, method=start.method)
        recipe = yaml.safe_load(made.text)
        assert recipe["merge_method"] == start.method
        assert ("base_model" in recipe) == (based and METHODS[start.method].reads_base)
        assert polymerge.plan(recipe).hash == made.plan.hash
        assert max(len(line) for line in made.text.split("\n") if line.startswith("#")) <= 120
        for other in found.starts:
            assert (f"# Or {other.method}: " in made.text) == (other is not start)


def test_every_kind_of_start_names_a_method_and_is_of_a_known_source() -> None:
    for starts in first_recipe._STARTS.values():
        assert len({one.method for one in starts}) == len(starts)
        for one in starts:
            assert one.method in METHODS
            own = {parameter.name for parameter in METHODS[one.method].parameters} | {"extra"}
            assert set(one.parameters) <= own, one


def test_two_vlms_of_different_architectures(tmp_path: Path) -> None:
    one, other = vlm(tmp_path / "one"), vlm(tmp_path / "other", without=["image_newline"])
    assert candidates([one, vlm(tmp_path / "same")]).kind == "fine-tunes"
    config = json.loads((other / "config.json").read_text())
    said = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    (other / "config.json").write_text(json.dumps(config | said))
    made = new_recipe([one, other])
    assert made.candidates.kind == "architectures"
    recipe = yaml.safe_load(made.text)
    assert [entry["parameters"]["weight"] for entry in recipe["models"]] == [0.7, 0.3]
    assert recipe["parts"] == ["text"]
    assert "exclude" not in recipe  # their vocabularies are one
    assert "AdaMMS" in made.text


def test_models_of_three(tmp_path: Path) -> None:
    models = [llm(tmp_path / name) for name in "abc"]
    found = candidates(models)
    assert [one.method for one in found.starts] == ["linear"]  # slerp is of two
    assert new_recipe(found).chosen.weights(3) == [0.3333] * 3


def test_adapters(tmp_path: Path) -> None:
    models = [adapter(tmp_path / "one"), adapter(tmp_path / "other")]
    found = candidates(models)
    assert (found.kind, found.base) == ("adapters", None)
    for start in found.starts:
        made = new_recipe(found, method=start.method)
        assert made.plan.of_adapters
        recipe = yaml.safe_load(made.text)
        assert "exclude" not in recipe
        assert polymerge.plan(recipe).hash == made.plan.hash
    assert "docs/adapters.md" in new_recipe(found).text


def test_what_makes_no_merge_is_refused(three: Family, tmp_path: Path) -> None:
    one, other = two_llamas(tmp_path)
    lora = adapter(tmp_path / "lora")
    for models, more, said in (
        ([one], {}, "two or more"),
        ([one, one], {}, "is named twice"),
        ([one, lora], {}, "is an adapter and"),
        ([one, other], {"template": tmp_path / "oter"}, "is none of the models. Did you mean"),
        ([one, tmp_path / "gone"], {}, "there is no such file or folder"),
    ):
        with pytest.raises(PolymergeError, match=said):
            candidates(models, **more)
    with pytest.raises(PolymergeError, match=r"method: 'ties' is none that people start from .* need `base`"):
        new_recipe([one, other], method="ties")
    deep = llm(tmp_path / "deep", layers=3)
    with pytest.raises(PolymergeError, match=r"depth: .* has 3 text layers"):
        new_recipe([three.vlm, deep])  # no recipe would plan


def test_tensors_that_a_model_lacks_stay_the_template_s(tmp_path: Path) -> None:
    whole, part = llm(tmp_path / "whole"), llm(tmp_path / "part", without=["model.norm.weight"])
    made = new_recipe([whole, part])
    assert yaml.safe_load(made.text)["missing"] == "copy"
    assert "missing: copy  # tensors that a model lacks stay the template's" in made.text


def test_the_page_shows_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    demo = "src/polymerge/demo/checkpoints"
    page = (ROOT / "docs" / "first-recipe.md").read_text(encoding="utf-8")
    assert f"`polymerge new {demo}/vlm {demo}/reason`" in page
    assert new_recipe([f"{demo}/vlm", f"{demo}/reason"]).text == page.split("```yaml\n")[1].split("```")[0]


# --- the command


def test_the_command_writes_it_and_shows_its_plan(three: Family, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    ran = cli("new", three.vlm, three.reason, "-o", file)
    assert (ran.status, ran.err) == (0, "")
    assert file.read_text() in ran.out
    assert "\nmerged: 19 tensors" in ran.out
    assert f"polymerge merge {file} -o merged" in ran.out
    assert cli("plan", file).status == 0
    again = cli("new", three.vlm, three.reason, "-o", file)
    assert again.status == 2
    assert "exists. Name another file with --out, or replace it with --force" in again.err
    report = json.loads(cli("new", three.vlm, three.reason, "-o", file, "--force", "--base", three.base, "--json").out)
    assert (report["kind"], report["method"], report["file"]) == ("llm into vlm", "task_arithmetic", str(file))
    assert set(report["others"]) == {"dare_linear", "linear", "ties", "ip_merge"}


def test_nothing_is_asked_without_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\n" * 9))
    ran = cli("new")
    assert ran.status == 2
    assert "say which models to merge: polymerge new MODEL MODEL" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_on_a_terminal_it_asks(three: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("old")
    answers = iter([three.vlm, three.reason, "", three.base, "2", "recipe.yaml", "mine.yaml"])
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(click.termui, "visible_prompt_func", lambda _: next(answers))
    ran = cli("new")
    assert ran.status == 0, ran.err
    assert "1. task_arithmetic: the VLM whole" in ran.err
    assert "recipe.yaml: exists" in ran.err
    assert yaml.safe_load((tmp_path / "mine.yaml").read_text())["merge_method"] == "dare_linear"
    assert (tmp_path / "recipe.yaml").read_text() == "old"
    assert next(answers, None) is None
