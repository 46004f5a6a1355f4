"""A config.json that names another class than the tensors have, or one that no table covers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import polymerge
from ignored import check_merge, problems_of, recipe_of, with_more
from polymerge.errors import Refused
from polymerge.families import FAMILIES, family_of, read_names
from polymerge.families.registry import GENERIC
from running import cli, merged, with_config
from tiny import build, load, open_model, perturbed
from tiny_configs import RUNNABLE

WRONG: dict[str, dict[str, Any]] = {
    "qwen2": {"architectures": ["Qwen2Model"]},
    "llama": {"architectures": ["LlamaForSequenceClassification"]},
    "gemma3": {"architectures": ["Gemma3ForCausalLM"]},
    "gemma3 whose type is wrong as well": {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"},
    "qwen2_5_vl": {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl"},
    "qwen2_vl": {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"},
    "llava": {"architectures": ["LlavaLlamaForCausalLM"]},
    "internvl": {"architectures": ["MyInternVL"]},
}


@pytest.mark.parametrize("kind", WRONG)
def test_the_tensors_decide_and_the_plan_says_so(kind: str, tmp_path: Path) -> None:
    family = kind.partition(" ")[0]
    one = build(family, tmp_path / "one", dtype="float32")
    other = with_config(perturbed(one, tmp_path / "other", seed=1), **WRONG[kind])
    plan = polymerge.plan(recipe_of(one, other))
    assert [entry.family for entry in plan.inputs] == [family, family]
    assert [warning for warning in plan.warnings if "where its family is published with" not in warning] == [
        f"'other': its config.json names {WRONG[kind]['architectures'][0]}, its tensors are those of family {family}, "
        "and are read as such",
    ]
    check_merge(merged(recipe_of(one, other), tmp_path / "out"), one, other)
    if family_of(WRONG[kind]) is GENERIC:  # a class that no table knows may be one of these tensors
        warnings = polymerge.plan(recipe_of(other, one)).warnings
        (said,) = [warning for warning in warnings if warning.startswith("the output has the config.json of 'other'")]
    else:
        (said,) = problems_of(recipe_of(other, one))
        assert said.startswith("template 'other': its config.json, which the output inherits, names ")
    assert FAMILIES[family].architectures[0] in said
    assert WRONG[kind]["architectures"][0] in said
    shown = cli("inspect", other)
    assert f"other: family {family}" in shown.out
    assert "note: 'other': its config.json names" in shown.out


def test_a_template_whose_class_cannot_load_it_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    one = build("gemma3", tmp_path / "one")
    wrong = with_config(perturbed(one, tmp_path / "wrong", seed=1), architectures=["Gemma3ForCausalLM"])
    assert problems_of(recipe_of(wrong, one)) == [
        "template 'wrong': its config.json, which the output inherits, names Gemma3ForCausalLM, and its tensors are "
        "those of family gemma3: the output would not load. Put the config.json of such a model there "
        "(Gemma3ForConditionalGeneration), or choose another template"
    ]


def test_the_check_at_the_end_refuses_a_class_that_no_table_knows(tmp_path: Path) -> None:
    one = build("qwen2", tmp_path / "one")
    wrong = with_config(perturbed(one, tmp_path / "wrong", seed=1), architectures=["Qwen2Model"])
    file = tmp_path / "r.json"
    file.write_text(json.dumps(recipe_of(wrong, one)), encoding="utf-8")
    ran = cli("merge", file, "-o", tmp_path / "out")
    assert ran.status == 1
    assert "loads: Qwen2Model" in ran.err
    assert "name one of family qwen2 there before merging: Qwen2ForCausalLM" in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [kind for kind in RUNNABLE if kind not in ("qwen2_5_omni",)])
def test_a_family_is_read_as_itself(kind: str, tmp_path: Path) -> None:
    folder = build(kind, tmp_path / kind)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    reading = read_names(config, load(folder))
    assert (reading.family, reading.wrappers, reading.other) == (family_of(config), (), "")
    unnamed = read_names({**config, "architectures": ["Nobody"]}, load(folder))
    assert unnamed.family.name == reading.family.name or kind == "qwen2_5_omni"
    assert unnamed.other == "Nobody"


@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen2_5_vl"])
def test_bodies_that_were_saved_alone(kind: str, tmp_path: Path) -> None:
    one = build(kind, tmp_path / "one", dtype="float32")
    other = perturbed(one, tmp_path / "other", seed=1)
    open_model(other, dtype=torch.float32).model.save_pretrained(tmp_path / "body")
    plan = polymerge.plan(recipe_of(one, tmp_path / "body", exclude=["text.lm_head.weight"]))
    assert plan.warnings == ("'body' has only the names of the body: 'model.' is read before each",)
    out = merged(recipe_of(one, tmp_path / "body", exclude=["text.lm_head.weight"]), tmp_path / "out")
    a, b = load(one), load(other)
    for name, tensor in load(out).items():
        wanted = a[name] if name.endswith("lm_head.weight") else 0.7 * a[name] + 0.3 * b[name]
        assert torch.allclose(tensor, wanted, rtol=0, atol=1e-6), name
    again = merged(recipe_of(tmp_path / "body", other, exclude=["text.lm_head.weight"]), tmp_path / "again")
    assert set(load(again)) == set(load(tmp_path / "body"))  # the template's own names, which its class loads


def test_a_reward_model_is_merged_with_a_chat_model_without_its_head(tmp_path: Path) -> None:
    chat = build("llama", tmp_path / "chat", dtype="float32")
    other = perturbed(chat, tmp_path / "other", seed=1)
    reward = with_more(other, {"score.weight": torch.ones(1, 32)}, tmp_path / "reward", drop=("lm_head.weight",))
    with_config(reward, architectures=["LlamaForSequenceClassification"])
    a, b = load(chat), load(other)
    for one, two, own in ((chat, reward, "lm_head"), (reward, chat, "score")):
        lacking, lost = problems_of(recipe_of(one, two, parts=["text"]))
        theirs = "score" if own == "lm_head" else "lm_head"
        assert lacking.startswith(f"text.{own}.weight: template '{one.name}' has it, '{two.name}' does not")
        assert lost.startswith(f"text.{theirs}.weight: '{two.name}' has it, template '{one.name}' does not")
    heads = ["text.lm_head.weight", "text.score.weight"]
    for place, asked in enumerate(
        (
            recipe_of(chat, {"model": str(reward), "ignore": ["score.*"]}, exclude=heads[:1]),
            recipe_of(chat, reward, exclude=heads),
            recipe_of(chat, reward, missing="copy"),
        )
    ):
        out = load(merged(asked, tmp_path / f"out{place}"))
        assert torch.equal(out.pop("lm_head.weight"), a["lm_head.weight"])
        for name, tensor in out.items():
            assert torch.allclose(tensor, 0.7 * a[name] + 0.3 * b[name], rtol=0, atol=1e-6), name
    # with their like they are merged head and all
    again = perturbed(reward, tmp_path / "again", seed=2)
    check_merge(merged(recipe_of(reward, again), tmp_path / "both", "--no-verify"), reward, again)


def test_what_nothing_explains_names_the_family_that_was_tried(tmp_path: Path) -> None:
    llm = build("qwen2", tmp_path / "llm")
    whole = build("qwen2_5_vl", tmp_path / "whole")
    wrong = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    vlm = with_config(perturbed(whole, tmp_path / "vlm", seed=1), **wrong)
    odd = with_more(vlm, {"ear.weight": torch.ones(2)}, tmp_path / "odd")
    plan = polymerge.plan(recipe_of(vlm, llm, template=str(whole)))
    assert [entry.family for entry in plan.inputs] == ["qwen2_5_vl", "qwen2_5_vl", "qwen2"]
    (problem,) = problems_of(recipe_of(llm, odd))
    assert "no rule of family 'qwen2' explains" in problem
    assert "If config.json names another model than the file holds, mend it" in problem


def test_what_two_tables_explain_is_not_guessed() -> None:
    names = dict.fromkeys(["language_model.model.norm.weight", "multi_modal_projector.w", "vision_tower.w"], (2,))
    # LLaVA's and InternVL's tables both read them; a type that is one of theirs decides
    unknown = read_names({"architectures": ["Nobody"], "model_type": "qwen2"}, names)
    assert unknown.family is GENERIC
    assert read_names({"architectures": ["Nobody"], "model_type": "llava"}, names).family.name == "llava"
    assert read_names({"architectures": ["Nobody"], "model_type": "internvl"}, names).family.name == "internvl"
    assert read_names({"architectures": ["Qwen2ForCausalLM"]}, names).family.name == "qwen2"  # and then refused
    assert read_names({"model_type": "rwkv"}, names).family is GENERIC
    assert read_names({}, names).family is GENERIC
    assert read_names({"model_type": "rwkv"}, names, "llava").family.name == "llava"


def test_a_strange_type_is_still_a_stranger(tmp_path: Path) -> None:
    one = build("llama", tmp_path / "one")
    other = with_config(perturbed(one, tmp_path / "other", seed=1), architectures=["Mystery"], model_type="mystery")
    with pytest.raises(Refused, match="has model_type 'mystery', which no family table covers"):
        polymerge.plan(recipe_of(one, other))
