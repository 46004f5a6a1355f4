"""Plans: vocabularies of several sizes, heads that are embeddings, and which model plays which part."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import polymerge
from headers_only import BUFFER, llm, vlm
from plans import EMBEDDING, HEAD, check_account, model_folders, names_in, reads_of, recipe_of, step_of
from polymerge.errors import Refused
from polymerge.families.expressions import Read, Rows
from polymerge.planning import Piece
from polymerge.planning.text import describe


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return model_folders(tmp_path_factory.mktemp("models"))


# --- rows of the vocabulary


def test_vocabularies_that_differ_are_kept_with_a_warning(folders: dict[str, str]) -> None:
    plan = polymerge.plan(recipe_of(folders, "linear", ("vlm", "wide")))
    step = step_of(plan, "language_model.lm_head.weight")
    assert (step.fate, step.reason) == ("copied", "vocabularies differ")
    assert (
        f"{EMBEDDING} and {HEAD}: 'wide' has 20 rows, template 'vlm' 16: vocabularies differ, so the template's is "
        "kept (vocab: overlap or by-token merges)"
    ) in plan.warnings
    reasons = {(entry.input, entry.name): entry.reason for entry in plan.left_out}
    assert reasons[1, "lm_head.weight"] == "the template's is kept: vocabularies differ"


def test_rows_that_all_have_are_merged_with_overlap(folders: dict[str, str]) -> None:
    for models, shared, total in ((("vlm", "base"), 12, 16), (("wide", "vlm"), 16, 20), (("vlm", "wide"), 16, 16)):
        recipe = recipe_of(folders, "linear", models, vocab="overlap", template=folders[models[0]])
        plan = polymerge.plan(recipe | {"parts": ["text"]})
        (step,) = (step for step in plan.steps if step.canonical == EMBEDDING)
        merged, *rest = step.pieces
        assert merged.rows == ((0, shared),)
        assert rest == ([Piece(EMBEDDING, ((shared, total),))] if shared < total else [])
        lost = "4 of the 20 rows of 'wide' are not read"
        assert step.reason == (f"rows {shared} to {total} are the template's" if rest else lost)
        for place, expr in reads_of(plan, merged):
            own = Read(next(name for name in names_in(plan.inputs[place].path) if name.endswith("embed_tokens.weight")))
            whole = {"vlm": 16, "base": 12, "wide": 20}[plan.inputs[place].label]
            assert expr == (own if whole == shared else Rows(own, 0, shared))
        assert plan.warnings == ()


# --- heads that are embeddings


def test_a_tied_model_s_embedding_is_merged_into_an_untied_head(folders: dict[str, str]) -> None:
    plan = polymerge.plan(recipe_of(folders, "linear", ("vlm", "tied")))
    head, embedding = (
        step_of(plan, f"language_model.{name}") for name in ("lm_head.weight", "model.embed_tokens.weight")
    )
    assert head.pieces[0].reads == (Read("language_model.lm_head.weight"), Read("model.embed_tokens.weight"))
    assert embedding.pieces[0].reads == (
        Read("language_model.model.embed_tokens.weight"),
        Read("model.embed_tokens.weight"),
    )
    assert "tied model.embed_tokens.weight" in describe(plan, full=True)


def test_a_tied_template_merges_its_embedding_and_stays_tied(tmp_path: Path, folders: dict[str, str]) -> None:
    template = vlm(tmp_path / "template", tie=True, head=False)
    plan = polymerge.plan(recipe_of(folders | {"vlm": str(template)}, "linear"))
    check_account(plan, [names_in(entry.path) for entry in plan.inputs])
    (step,) = [step for step in plan.steps if step.name.endswith(("lm_head.weight", "embed_tokens.weight"))]
    assert (step.fate, step.canonical) == ("merged", EMBEDDING)
    assert step.pieces[0].reads == (
        Read("language_model.model.embed_tokens.weight"),
        Read("model.embed_tokens.weight"),
    )
    reasons = {entry.name: entry.reason for entry in plan.left_out}
    assert reasons["lm_head.weight"] == "the template ties its head to its embedding"
    assert plan.warnings == (
        "'llm' has a head of its own, which the tied template 'template' has no place for: nothing of that head is in "
        "the output. Make 'llm' the template to merge heads",
    )


def test_a_head_that_is_stored_is_a_tensor_whatever_the_config_says(tmp_path: Path, folders: dict[str, str]) -> None:
    template = vlm(tmp_path / "template", tie=True, head=True)
    plan = polymerge.plan(recipe_of(folders | {"vlm": str(template)}, "linear"))
    check_account(plan, [names_in(entry.path) for entry in plan.inputs])
    head = step_of(plan, "language_model.lm_head.weight")
    assert (head.fate, head.canonical) == ("merged", HEAD)
    assert head.pieces[0].reads == (Read("language_model.lm_head.weight"), Read("lm_head.weight"))
    assert head.pieces[0].twin == EMBEDDING  # drawn alike, so that a mere copy of it stays one
    assert not plan.warnings


@pytest.mark.parametrize(("named", "warned"), [([HEAD], True), ([EMBEDDING], True), ([HEAD, EMBEDDING], False)])
def test_one_name_of_a_tied_tensor_in_exclude_is_said(
    tmp_path: Path, folders: dict[str, str], named: list[str], warned: bool
) -> None:
    template = vlm(tmp_path / "template", tie=True, head=False)
    places = folders | {"vlm": str(template)}
    plan = polymerge.plan(recipe_of(places, "linear", ("vlm", "tied"), exclude=named))
    assert any("exclude names one of" in said for said in plan.warnings) == warned
    fate = step_of(plan, "language_model.model.embed_tokens.weight").fate
    assert fate == ("copied" if EMBEDDING in named else "merged")


def test_two_tied_models_are_merged_without_a_word(tmp_path: Path, folders: dict[str, str]) -> None:
    template = vlm(tmp_path / "template", tie=True, head=False)
    plan = polymerge.plan(recipe_of(folders | {"vlm": str(template)}, "linear", ("vlm", "tied")))
    assert plan.warnings == ()
    assert {entry.name for entry in plan.left_out} == {BUFFER}


def test_a_config_that_says_nothing_of_ties_goes_by_what_is_stored(tmp_path: Path, folders: dict[str, str]) -> None:
    silent = {stored: str(llm(tmp_path / f"silent-{stored}", tie=None, head=stored)) for stored in (True, False)}
    for stored, folder in silent.items():
        plan = polymerge.plan(recipe_of(folders | {"llm": folder}, "linear"))
        head = step_of(plan, "language_model.lm_head.weight")
        assert head.pieces[0].reads[1] == Read("lm_head.weight" if stored else "model.embed_tokens.weight")


def test_a_missing_head_that_is_not_tied_is_missed(tmp_path: Path, folders: dict[str, str]) -> None:
    headless = str(llm(tmp_path / "headless", tie=False, head=False))
    with pytest.raises(Refused, match=r"text\.lm_head\.weight: template 'vlm' has it, 'headless' does not"):
        polymerge.plan(recipe_of(folders | {"llm": headless}, "linear"))


def torch_vlm(folder: Path, tie: bool) -> str:
    """A VLM in a torch file, whose head is its embedding's storage, with a number beside the tensors."""
    vlm(folder, tie=tie)
    weights = load_file(folder / "model.safetensors")
    weights["language_model.lm_head.weight"] = weights["language_model.model.embed_tokens.weight"]
    torch.save({**weights, "epoch": 3}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return str(folder)


@pytest.mark.parametrize("tie", [True, False])
def test_shared_storage_stays_shared_if_the_config_ties_it(tmp_path: Path, folders: dict[str, str], tie: bool) -> None:
    recipe = recipe_of(folders | {"vlm": torch_vlm(tmp_path / "template", tie)}, "linear")
    plan = polymerge.plan(recipe)
    names = ["language_model.lm_head.weight", "language_model.model.embed_tokens.weight"]
    fates = {step.fate: step for step in map(partial(step_of, plan), names)}
    if not tie:
        assert set(fates) == {"merged"}
        return
    assert set(fates) == {"merged", "tied"}
    tied, first = fates["tied"], fates["merged"]
    assert (tied.same_as, tied.reason, tied.size, tied.pieces) == (first.name, f"tied to {first.name}", 0, ())
    assert plan.size == sum(step.size for step in plan.steps if step is not tied)
    assert plan.counts()["tied"] == 1
    assert f"tied: 1 tensors, 0 B\n  tied to {first.name}: 1 ({tied.name})" in describe(plan)
    assert polymerge.plan(json.loads(json.dumps(plan.to_json()))) == plan


def test_what_is_no_tensor_in_a_file_is_left_out_with_a_word(tmp_path: Path, folders: dict[str, str]) -> None:
    recipe = recipe_of(folders | {"vlm": torch_vlm(tmp_path / "template", tie=True)}, "linear")
    (warning,) = (one for one in polymerge.plan(recipe).warnings if "epoch" in one)
    assert warning.startswith("'template': 'epoch' in its file is left out: is ")


# --- which models play which part


def test_a_base_among_the_models_is_dropped_whatever_it_says(folders: dict[str, str]) -> None:
    recipe = recipe_of(folders, "task_arithmetic", ("vlm", "llm"))
    without = polymerge.plan(recipe)
    among = polymerge.plan(recipe | {"models": [{"model": folders["base"]}, *recipe["models"]]})
    assert (among.models, among.settings, among.steps) == (without.models, without.settings, without.steps)
    assert among.hash == without.hash
    weighted = [{"model": folders["base"], "parameters": {"weight": 1}}, *recipe["models"]]
    assert polymerge.plan(recipe | {"models": weighted}).hash == without.hash


def test_the_first_multimodal_model_is_the_template_unless_the_recipe_names_one(folders: dict[str, str]) -> None:
    plan = polymerge.plan(recipe_of(folders, "linear", ("llm", "tuned", "vlm"), parts=["text"]))
    assert [entry.label for entry in plan.inputs] == ["tuned", "llm", "vlm"]
    assert (plan.template, plan.models) == (0, (1, 0, 2))
    plan = polymerge.plan(recipe_of(folders, "linear", ("llm", "tied")))
    assert (plan.inputs[plan.template].label, plan.models) == ("llm", (0, 1))


def test_two_names_of_one_place_are_one_input(folders: dict[str, str]) -> None:
    again = f"{Path(folders['vlm']).parent}/llm/../vlm"
    plan = polymerge.plan(recipe_of(folders | {"tuned": again}, "linear", ("vlm", "tuned", "llm")))
    assert (len(plan.inputs), plan.models) == (2, (0, 0, 1))


def test_models_of_one_name_are_told_apart_by_their_folders(tmp_path: Path, folders: dict[str, str]) -> None:
    places = [str(llm(tmp_path / parent / "final")) for parent in ("maths", "code")]
    plan = polymerge.plan(
        recipe_of(folders | dict(zip(("llm", "tied"), places, strict=True)), "linear", ("llm", "tied"))
    )
    assert [entry.label for entry in plan.inputs] == ["maths/final", "code/final"]


def test_a_template_need_not_be_merged(folders: dict[str, str]) -> None:
    plan = polymerge.plan(recipe_of(folders, "linear", ("llm", "tied"), template=folders["vlm"]))
    assert "template 'vlm' only provides the layout: it is not among models" in plan.warnings
    assert (plan.template, plan.models) == (0, (1, 2))
    assert step_of(plan, "language_model.model.norm.weight").pieces[0].reads == (Read("model.norm.weight"),) * 2


def test_a_base_that_no_method_needs_is_not_read(folders: dict[str, str]) -> None:
    plan = polymerge.plan(recipe_of(folders, "linear", with_base=True))
    assert (plan.base, len(plan.inputs)) == (None, 2)
    assert "base_model 'base' is not read: linear needs none" in plan.warnings


@pytest.mark.parametrize("where", ["parameters", "models", "overrides"])
def test_int8_mask_is_said_to_have_no_effect(folders: dict[str, str], where: str) -> None:
    recipe = recipe_of(folders, "linear")
    if where == "parameters":
        recipe["parameters"] = {"int8_mask": True}
    elif where == "models":
        recipe["models"][0]["parameters"]["int8_mask"] = True
    else:
        recipe["overrides"] = [{"layers": 0, "parameters": {"int8_mask": True}}]
    assert "int8_mask has no effect" in polymerge.plan(recipe).warnings


def test_a_plan_says_its_size_and_its_counts(folders: dict[str, str]) -> None:
    plan = polymerge.plan(recipe_of(folders, "linear"))
    assert plan.counts() == {"merged": 21, "copied": 6, "folded": 0, "dequantized": 0, "tied": 0}
    assert len(list(plan.merged_pieces())) == 21
