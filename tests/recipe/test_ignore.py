"""What the recipe ignores: tensors that are not of a model, by their names as stored, and said in the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import polymerge
from adapters_made import PEFT_WARNINGS, adapter, llama, loaded
from ignored import VALUE_HEAD, check_merge, problems_of, recipe_of, with_more
from polymerge.errors import Refused
from polymerge.recipe.parsing import read_recipe
from polymerge.recipe.recipe import recipe_dict
from running import cli, merged, raw, recipe_file
from tiny import build, load, perturbed, related_llm

pytestmark = PEFT_WARNINGS

MTP = {"mtp.fc.weight": torch.ones(4, 8), "model.mtp.layers.0.mlp.up_proj.weight": torch.ones(4, 4)}


@pytest.fixture(params=["qwen2", "llama", "gemma2"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    one = build(request.param, tmp_path / "one", dtype="float32")
    return one, perturbed(one, tmp_path / "other", seed=1)


@pytest.mark.parametrize(("more", "globs"), [(VALUE_HEAD, ["v_head.*"]), (MTP, ["mtp.*", "model.mtp.*"])])
@pytest.mark.parametrize("beside", [True, False], ids=["beside the model", "for all"])
def test_the_rest_is_merged(
    more: dict[str, Tensor], globs: list[str], beside: bool, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    one, other = pair
    odd = with_more(other, more, tmp_path / "odd")
    asked = recipe_of(one, {"model": str(odd), "ignore": globs}) if beside else recipe_of(one, odd, ignore=globs)
    plan = polymerge.plan(asked)
    left = [(plan.inputs[entry.input].label, entry.name, entry.reason) for entry in plan.left_out]
    assert sorted(left) == sorted(("odd", name, "ignored by the recipe") for name in more)
    check_merge(merged(asked, tmp_path / "out"), one, other)
    assert raw(tmp_path / "out") == raw(merged(recipe_of(one, other), tmp_path / "plain"))
    assert recipe_dict(read_recipe(plan.recipe)) == plan.recipe  # which says it
    assert (plan.recipe["models"][1] if beside else plan.recipe)["ignore"] == globs
    assert polymerge.plan(plan.recipe).hash == plan.hash


def test_what_is_ignored_in_the_template_is_not_in_the_output(pair: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = pair
    odd = with_more(one, VALUE_HEAD, tmp_path / "odd")
    asked = recipe_of(odd, other, ignore=["v_head.*"])
    plan = polymerge.plan(asked)
    assert [entry.name for entry in plan.left_out] == list(VALUE_HEAD)[::-1]
    assert (
        "ignored by the recipe: 2 (v_head.summary.bias, v_head.summary.weight)"
        in cli("plan", recipe_file(asked, tmp_path / "r.yaml")).out
    )
    check_merge(merged(asked, tmp_path / "out"), one, other)  # which loads, as the check at its end has found


def test_names_are_those_stored_or_those_without_what_a_trainer_put_before(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    one, other = pair
    odd = with_more(other, VALUE_HEAD, tmp_path / "odd", before="module.")
    for glob in ("v_head.*", "module.v_head.*"):
        plan = polymerge.plan(recipe_of(one, odd, ignore=[glob]))
        assert sorted(entry.name for entry in plan.left_out) == sorted(VALUE_HEAD)
    # TRL has its own prefix before all but the head
    inner = with_more(other, {}, tmp_path / "inner", before="pretrained_model.")
    trl = with_more(inner, VALUE_HEAD, tmp_path / "trl")
    out = merged(recipe_of(one, trl, ignore=["v_head.*"]), tmp_path / "out")
    check_merge(out, one, other)


def test_on_the_command_line(tmp_path: Path) -> None:
    one = build("qwen2", tmp_path / "one", dtype="float32")
    odd = with_more(perturbed(one, tmp_path / "other", seed=1), VALUE_HEAD, tmp_path / "odd")
    words = ("--template", one, "--with", odd, "--method", "linear", "--weight", "0.7,0.3", "--ignore", "v_head.*")
    assert cli("plan", *words).status == 0
    ran = cli("merge", *words, "-o", tmp_path / "out")
    assert ran.status == 0, ran.err
    check_merge(tmp_path / "out", one, tmp_path / "other")
    assert '`ignore: ["v_head.*"]`' in cli("inspect", odd).err
    shown = cli("inspect", odd, "--ignore", "v_head.*")
    assert shown.status == 0
    assert "note: 2 of its tensors are ignored" in shown.out


def test_a_glob_that_matches_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = pair
    odd = with_more(other, VALUE_HEAD, tmp_path / "odd")
    said = problems_of(recipe_of(one, {"model": str(odd), "ignore": ["v_head.*", "v_haed.summary.bias"]}))
    assert said == [
        f"recipe: '{odd}': ignore: 'v_haed.summary.bias' matches no tensor; globs are matched against entire stored "
        "names. Did you mean 'v_head.summary.bias'?"
    ]
    said = problems_of(recipe_of(one, other, ignore=["zzz*"]))
    (problem,) = said
    assert problem.startswith("recipe: ignore: 'zzz*' matches no tensor; globs are matched against entire stored names")
    # beside one model it has to match there
    (problem,) = problems_of(recipe_of(odd, {"model": str(other), "ignore": ["v_head.*"]}, ignore=["v_head.*"]))
    assert problem.startswith(f"recipe: '{other}': ignore: 'v_head.*' matches no tensor")


@pytest.mark.parametrize("value", ["yes", [3], {"a": 1}, 3])
def test_it_is_a_list_of_globs(value: Any) -> None:
    recipe = {"merge_method": "linear", "models": ["a"], "ignore": value}
    if value == "yes":
        assert read_recipe(recipe).ignore == ("yes",)
        return
    with pytest.raises(Refused, match="recipe: ignore has to be a list of globs on stored tensor names, got"):
        read_recipe(recipe)
    with pytest.raises(Refused, match=r"recipe: models\[0\]: ignore has to be a list of globs"):
        read_recipe({"merge_method": "linear", "models": [{"model": "a", "ignore": value}]})


# --- what a model needs


def test_what_the_template_needs_is_not_ignored(tmp_path: Path) -> None:
    vlm = build("llava", tmp_path / "vlm", dtype="float32")
    llm = related_llm(vlm, tmp_path / "llm", seed=1)
    for glob, kind in (
        ("language_model.lm_head.weight", "text.lm_head.weight"),
        ("*.norm.weight", "text.norm.weight"),
        # no other model has a part of this kind, and so none shows that it may lack
        ("multi_modal_projector.linear_1.bias", "projector.linear_1.bias"),
    ):
        (problem,) = problems_of(recipe_of(vlm, llm, ignore=[glob], exclude=[kind]))
        assert problem == (
            f"recipe: ignore: {kind}: the output would be without this tensor of template 'vlm', which its "
            "architecture needs. Use exclude, with canonical names, to keep the template's"
        )
    (problem,) = problems_of(recipe_of(vlm, llm, ignore=["vision_tower.*"]))
    assert "..." in problem
    assert "which its architecture needs" in problem


def test_what_only_the_template_has_of_a_part_may_be_ignored(pair: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = pair
    statistics = {"model.layers.0.mlp.act_fn.scale": torch.ones(1)}
    odd = with_more(one, statistics, tmp_path / "odd")
    out = merged(recipe_of(odd, other, ignore=["*.act_fn.scale"]), tmp_path / "out")
    check_merge(out, one, other)
    both = with_more(other, statistics, tmp_path / "both")
    (problem,) = problems_of(recipe_of(odd, both, ignore=["*.act_fn.scale"]))
    assert problem.startswith(
        "recipe: ignore: text.layers.{i}.mlp.act_fn.scale: the output would be without this tensor"
    )
    # layers beyond those that the config counts are none of the model's
    deep = {"model.layers.2.mlp.up_proj.weight": torch.ones(2, 2)}
    models = [with_more(model, deep, tmp_path / f"deep {model.name}") for model in pair]
    check_merge(merged(recipe_of(*models, ignore=["model.layers.2.*"]), tmp_path / "shallow"), one, other)


def test_a_model_that_is_no_template_lacks_what_is_ignored(pair: tuple[Path, Path]) -> None:
    one, other = pair
    asked = recipe_of(one, {"model": str(other), "ignore": ["model.norm.weight"]})
    assert problems_of(asked) == [
        "text.norm.weight: template 'one' has it, 'other' does not because the recipe ignores it. If it may stay the "
        "template's, name it in exclude"
    ]
    plan = polymerge.plan(asked | {"exclude": ["text.norm.weight"]})
    assert ("model.norm.weight", "ignored by the recipe") in {(entry.name, entry.reason) for entry in plan.left_out}


def test_exclude_is_not_for_names_as_stored(pair: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = pair
    odd = with_more(other, VALUE_HEAD, tmp_path / "odd")
    unknown, misplaced = problems_of(recipe_of(one, odd, exclude=["v_head.*"]))
    assert "explains 2 of its" in unknown
    assert '`ignore: ["v_head.*"]` in the recipe' in unknown
    assert misplaced == (
        "recipe: exclude: 'v_head.*' matches stored names but no canonical one. Tensors that are not part of a model "
        "are left out "
        'by `ignore: ["v_head.*"]`'
    )


# --- beside a base and its adapter


def test_an_adapter_s_own_head_is_ignored_where_it_is_folded(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    folder = adapter(tmp_path / "adapter")
    wanted = loaded(folder).merge_and_unload().state_dict()
    file = folder / "adapter_model.safetensors"
    head = {f"base_model.model.{name}": tensor for name, tensor in VALUE_HEAD.items()}
    save_file(load_file(file) | head, file, metadata={"format": "pt"})
    words = ("fold", folder, "--base", tmp_path / "base")
    unasked = cli(*words, "--dry-run")
    assert (unasked.status, unasked.out.startswith("note: 'adapter': 'adapter/base_model.model.v_head.")) == (0, True)
    ran = cli(*words, "--ignore", "*v_head*", "-o", tmp_path / "out")
    assert ran.status == 0, ran.err
    for name, tensor in load(tmp_path / "out").items():
        assert torch.allclose(tensor, wanted[name], rtol=0, atol=1e-6), name
    assert "ignored by the recipe: 2" in cli(*words, "--ignore", "*v_head*", "--dry-run").out
    said = {"merge_method": "linear", "models": [str(folder)], "ignore": ["*v_head*"]}
    ran = cli("plan", recipe_file(said, tmp_path / "adapters.yaml"))
    assert "recipe: ignore is for checkpoints; name what adapters leave out in exclude" in ran.err
