"""Tensors of their own for image tokens: filled from the only one there is, or kept; globs; what is never merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import polymerge
from layouts import ATTENTION, KEYS_AND_VALUES, MLP, NORMS, TWICE, Sizes, load, random_tower, same_bits, text_of, write
from polymerge.errors import Refused
from polymerge.planning import Plan, make_plan
from polymerge.planning.compare import inspect
from polymerge.planning.text import describe

SIZES = Sizes(heads=6, shared=2, width=2)
LAYERS = range(SIZES.layers)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint in every layout with branches, and two without, all different."""
    room = tmp_path_factory.mktemp("branches")
    return {
        layout: write(layout, room / layout, random_tower(SIZES, seed, TWICE.get(layout, ())), SIZES, seed=seed)
        for seed, layout in enumerate(("cogvlm", "mplug_owl2", "llava_original", "llama"))
    }


def recipe(folders: dict[str, Path], *layouts: str, **more: Any) -> dict[str, Any]:
    models = [{"model": str(folders[layout]), "parameters": {"weight": 0.5}} for layout in layouts]
    return {"merge_method": "linear", "models": models, **more}


def merged_names(plan: Plan) -> set[str]:
    return {piece.canonical.removeprefix("text.") for _, piece, _ in plan.merged_pieces()}


def half(one: Tensor, other: Tensor) -> Tensor:
    return (0.5 * one.float() + 0.5 * other.float()).to(one.dtype)


def towers(folders: dict[str, Path], *layouts: str) -> list[dict[str, Tensor]]:
    return [text_of(layout, folders[layout], SIZES) for layout in layouts]


# --- fill and retain


@pytest.mark.parametrize("template", ["cogvlm", "mplug_owl2"])
def test_both_branches_are_filled_from_the_only_one(folders: dict[str, Path], template: str, tmp_path: Path) -> None:
    mine, theirs = towers(folders, template, "llava_original")
    out = polymerge.merge(recipe(folders, template, "llava_original"), tmp_path / "out", check=False).folder
    merged = text_of(template, out, SIZES)
    images = {name for name in merged if name.endswith("@image")}
    assert len(images) == len(TWICE[template]) * SIZES.layers
    for name, tensor in merged.items():
        assert same_bits(tensor, half(mine[name], theirs[name.partition("@")[0]])), name


def test_a_branch_that_is_retained_stays_byte_for_byte(folders: dict[str, Path], tmp_path: Path) -> None:
    mine, theirs = towers(folders, "cogvlm", "llava_original")
    asked = recipe(folders, "cogvlm", "llava_original", branches="retain")
    merged = text_of("cogvlm", polymerge.merge(asked, tmp_path / "out", check=False).folder, SIZES)
    for name, tensor in merged.items():
        expected = mine[name] if name.endswith("@image") else half(mine[name], theirs[name])
        assert same_bits(tensor, expected), name
    shown = describe(make_plan(asked))
    assert "'llava_original' has no branch @image of it, and branches: retain: 10 (" in shown


def test_of_a_fused_tensor_only_the_rows_are_retained_that_have_no_branch(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """mPLUG-Owl2 has keys and values for image tokens, and no queries: these stay CogVLM's."""
    mine, theirs = towers(folders, "cogvlm", "mplug_owl2")
    asked = recipe(folders, "cogvlm", "mplug_owl2", branches="retain")
    merged = text_of("cogvlm", polymerge.merge(asked, tmp_path / "out", check=False).folder, SIZES)
    both = {f"layers.{layer}.{name}@image" for layer in LAYERS for name in KEYS_AND_VALUES}
    for name, tensor in merged.items():
        if name.endswith("@image") and name not in both:
            assert same_bits(tensor, mine[name]), name
        else:
            assert same_bits(tensor, half(mine[name], theirs[name])), name
    plan = make_plan(asked)
    (step,) = (
        step for step in plan.steps if step.name == "model.layers.1.self_attn.vision_expert_query_key_value.weight"
    )
    assert [(piece.setting, piece.rows) for piece in step.pieces] == [
        (None, ((0, 12),)),
        (0, ((12, 16),)),
        (0, ((16, 20),)),
    ]
    kept = "text.layers.1.self_attn.q_proj.weight@image is the template's"
    assert step.reason == f"{kept}: 'mplug_owl2' has no branch @image of it, and branches: retain"


def test_a_base_without_branches_retains_nothing(folders: dict[str, Path]) -> None:
    """The common ancestor is a plain language model; whether a weight is there twice is asked of the models."""
    deltas: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": str(folders["llama"])}
    plain = make_plan(recipe(folders, "cogvlm", "mplug_owl2", branches="retain"))
    plan = make_plan(recipe(folders, "cogvlm", "mplug_owl2", branches="retain") | deltas)
    assert merged_names(plan) == merged_names(plain)
    bases = {
        piece.canonical: piece.base for _, piece, _ in plan.merged_pieces() if ".1.self_attn.k_proj" in piece.canonical
    }
    assert len(bases) == 2
    assert len(set(bases.values())) == 1, "both branches are measured from one tensor"


def test_a_template_without_branches_takes_that_of_text_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    mine, cog, owl = towers(folders, "llava_original", "cogvlm", "mplug_owl2")
    asked = recipe(folders, "llava_original", "cogvlm", "mplug_owl2", parameters={"normalize": False})
    merged = text_of("llava_original", polymerge.merge(asked, tmp_path / "out", check=False).folder, SIZES)
    for name, tensor in merged.items():
        expected = 0.5 * mine[name].float() + 0.5 * cog[name].float() + 0.5 * owl[name].float()
        assert same_bits(tensor, expected.to(tensor.dtype)), name


def test_each_template_takes_the_branches_that_it_has(folders: dict[str, Path], tmp_path: Path) -> None:
    """CogVLM has no norms of its own for image tokens: those of mPLUG-Owl2 have no place there; the plan says so."""
    mine, theirs = towers(folders, "mplug_owl2", "cogvlm")
    asked = recipe(folders, "mplug_owl2", "cogvlm")
    merged = text_of("mplug_owl2", polymerge.merge(asked, tmp_path / "out", check=False).folder, SIZES)
    for name, tensor in merged.items():
        other = name if name in theirs else name.partition("@")[0]
        assert same_bits(tensor, half(mine[name], theirs[other])), name
    reverse = make_plan(recipe(folders, "cogvlm", "mplug_owl2"))
    norms = {entry.name for entry in reverse.left_out if entry.reason == "the template has no branch @image of it"}
    assert norms == {
        f"model.layers.{i}.{name.replace('.weight', '.multiway.1.weight')}" for i in LAYERS for name in NORMS
    }


def test_another_word_for_branches_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(Refused, match="branches has to be fill or retain, got 'keep'"):
        make_plan(recipe(folders, "cogvlm", "llava_original", branches="keep"))


# --- globs


@pytest.mark.parametrize(
    ("glob", "kept"),
    [
        ("text.layers.*.mlp.*", {(name, branch) for name in MLP for branch in ("", "@image")}),
        ("text.layers.*.mlp.*@image", {(name, "@image") for name in MLP}),
        ("text.layers.*.mlp.*@text", {(name, "") for name in MLP}),
        ("text.layers.*.self_attn.k_proj.weight", {(ATTENTION[1], ""), (ATTENTION[1], "@image")}),
        ("*@image", {(name, "@image") for name in TWICE["cogvlm"]}),
        ("*layernorm.weight", {(name, "") for name in NORMS}),
    ],
)
@pytest.mark.parametrize("how", ["exclude", "overrides"])
def test_a_glob_without_a_branch_matches_both(
    folders: dict[str, Path], glob: str, kept: set[tuple[str, str]], how: str
) -> None:
    said: Any = [glob] if how == "exclude" else [{"match": glob, "merge_method": "copy"}]
    everything = merged_names(make_plan(recipe(folders, "cogvlm", "mplug_owl2")))
    left = merged_names(make_plan(recipe(folders, "cogvlm", "mplug_owl2", **{how: said})))
    dropped = {name.removesuffix("@text") for name in everything - left}
    assert dropped == {f"layers.{i}.{name}{branch}" for i in LAYERS for name, branch in kept}
    assert left < everything


def test_a_glob_of_a_branch_that_nothing_has_is_an_error(folders: dict[str, Path]) -> None:
    with pytest.raises(Refused, match=r"'text.layers.\*.mlp.\*@sound' matches no tensor"):
        make_plan(recipe(folders, "cogvlm", "llava_original", exclude=["text.layers.*.mlp.*@sound"]))


# --- norms and buffers


def test_norms_are_merged_unless_they_are_excluded(folders: dict[str, Path]) -> None:
    norms = {f"layers.{i}.{name}" for i in LAYERS for name in NORMS} | {"norm.weight"}
    assert norms < merged_names(make_plan(recipe(folders, "cogvlm", "mplug_owl2")))
    without = make_plan(recipe(folders, "mplug_owl2", "cogvlm", exclude=["text.*norm.weight"]))
    assert not {name for name in merged_names(without) if "norm" in name}
    excluded = {step.name for step in without.steps if (step.fate, step.reason) == ("copied", "excluded by the recipe")}
    assert len(excluded) == 4 * SIZES.layers + 1


@pytest.mark.parametrize(("template", "source"), [("cogvlm", "mplug_owl2"), ("mplug_owl2", "llava_original")])
@pytest.mark.parametrize("more", [{}, {"dtype": "float32"}, {"merge_method": "ties"}])
def test_rotary_frequencies_are_never_merged(
    folders: dict[str, Path], template: str, source: str, more: dict[str, Any], tmp_path: Path
) -> None:
    asked = recipe(folders, template, source, **more)
    if "merge_method" in more:
        asked |= {"base_model": str(folders["llama"]), "parameters": {"density": 0.5}}
    out = load(polymerge.merge(asked, tmp_path / "out", check=False).folder)
    before, other = load(folders[template]), load(folders[source])
    buffers = [name for name in before if name.endswith("inv_freq")]
    assert len(buffers) == SIZES.layers
    for name in buffers:
        assert same_bits(out[name], before[name])
        assert other[name].shape == before[name].shape
    text = "model.norm.weight"
    assert not torch.equal(out[text].float(), before[text].float())


# --- inspect


def test_inspect_says_what_joins_in_either_direction(folders: dict[str, Path]) -> None:
    found = inspect(str(folders["cogvlm"]), str(folders["mplug_owl2"]))
    portraits, joints = found.models, found.pairs
    assert [(one.family, one.text_tower, one.layers, one.width) for one in portraits] == [
        ("cogvlm", "llama", 2, 12),
        ("mplug_owl2", "llama", 2, 12),
    ]
    into_cog, into_owl = joints
    assert (into_cog.template, into_cog.other) == ("cogvlm", "mplug_owl2")
    assert into_cog.obstacles == into_owl.obstacles == ()
    assert into_cog.parts == into_owl.parts == ("text",)
    # embedding, norm and head; in each of two layers: two norms, and seven tensors for text and for image tokens
    assert into_cog.joined == 3 + 2 * (2 + 2 * 7)
    # the same; norms, keys and values twice
    assert into_owl.joined == 3 + 2 * (9 + 4)
    assert into_cog.kept == ("4 tensors of its branch @image have no place in the template",)
    # queries, outputs and the three of the MLP
    assert into_owl.kept == ("10 tensors of its branch @image have no place in the template",)


def test_inspect_joins_a_plain_tower_to_both_branches(folders: dict[str, Path]) -> None:
    into_cog, into_llava = inspect(str(folders["cogvlm"]), str(folders["llava_original"])).pairs
    assert (into_cog.joined, into_cog.kept) == (3 + 2 * (2 + 2 * 7), ())
    assert into_llava.joined == 3 + 2 * 9
    assert into_llava.kept == ("14 tensors of its branch @image have no place in the template",)
