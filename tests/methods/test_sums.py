"""MetaGPT, whole-model TIES and DARE on models of different layouts, against the formulas written out.

The weight of a model in MetaGPT is |delta|^2 over the sum of all models', the norms over everything that is merged. The
literal one here adds the squares up exactly, in fractions, and rounds where polymerge documents that it does.
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import polymerge
from layouts import TWICE, Sizes, load, random_tower, same_bits, text_of, write
from literal_methods import elected, largest
from polymerge.methods.sums import metagpt
from polymerge.planning import make_plan

SIZES = Sizes(heads=6, shared=2, width=2, inner=9, rows=11)
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A CogVLM and an mPLUG-Owl2 that have moved from one Llama, the first of them further."""
    room = tmp_path_factory.mktemp("metagpt")
    base = random_tower(SIZES, 1, dtype=request.param)
    made = {"llama": write("llama", room / "llama", base, SIZES)}
    for layout, size, seed in (("cogvlm", 0.3, 2), ("mplug_owl2", 0.1, 3)):
        step = random_tower(SIZES, seed, TWICE[layout], torch.float32)
        tower = {
            name: (base[name.partition("@")[0]].float() + size * move).to(request.param) for name, move in step.items()
        }
        made[layout] = write(layout, room / layout, tower, SIZES)
    return made


def recipe(folders: dict[str, Path], template: str = "cogvlm", **more: Any) -> dict[str, Any]:
    return {
        "merge_method": "metagpt",
        "template": str(folders[template]),
        "base_model": str(folders["llama"]),
        "models": [{"model": str(folders[layout])} for layout in ("cogvlm", "mplug_owl2")],
        **more,
    }


def deltas_of(folders: dict[str, Path], template: str) -> tuple[Tensors, dict[str, list[Tensor]]]:
    """For every tensor of the template's text tower: the base, and each model's float32 delta to it."""
    towers = [text_of(layout, folders[layout], SIZES) for layout in ("cogvlm", "mplug_owl2")]
    base = text_of("llama", folders["llama"], SIZES)
    names = text_of(template, folders[template], SIZES)
    old = {name: base[name.partition("@")[0]].float() for name in names}
    moved = {
        name: [
            (tower[name] if name in tower else tower[name.partition("@")[0]]).float() - old[name] for tower in towers
        ]
        for name in names
    }
    return old, moved


def merged(recipe: dict[str, Any], template: str, out: Path, **how: Any) -> Tensors:
    return text_of(template, polymerge.merge(recipe, out, check=False, **how).folder, SIZES)


def exact_shares(deltas: list[list[Tensor]]) -> list[float]:
    """Each model's share of all squares, from exact sums."""
    squares = [sum(Fraction(value) ** 2 for delta in own for value in delta.ravel().tolist()) for own in deltas]
    sums = [float(square) for square in squares]
    return [square / (sums[0] + sums[1]) for square in sums]


# --- MetaGPT


@pytest.mark.parametrize("template", ["cogvlm", "mplug_owl2"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_metagpt_is_the_literal_loop(folders: dict[str, Path], template: str, scale: float, tmp_path: Path) -> None:
    old, moved = deltas_of(folders, template)
    shares = exact_shares([[moved[name][model] for name in sorted(moved)] for model in (0, 1)])
    assert 0.8 < shares[0] < 0.95, "the one that moved three times as far has nine tenths"
    assert sum(shares) == pytest.approx(1, abs=1e-15)
    out = merged(recipe(folders, template, parameters={"scale": scale}), template, tmp_path / "out")
    for name, (first, second) in moved.items():
        change = torch.tensor(shares[0]).float() * first + torch.tensor(shares[1]).float() * second
        expected = old[name] + scale * change
        assert same_bits(out[name], expected.to(out[name].dtype)), name


def test_metagpt_counts_what_is_merged_and_nothing_else(folders: dict[str, Path], tmp_path: Path) -> None:
    """Excluded tensors are not in the norms; another setting has norms of its own."""
    old, moved = deltas_of(folders, "cogvlm")
    left = {name for name in moved if ".mlp." in name or name.endswith("norm.weight")}
    kept = {name for name in moved if name not in left}
    asked = recipe(folders, exclude=["text.layers.*.mlp.*", "*norm.weight"])
    asked["overrides"] = [{"layers": "1-1", "parameters": {"scale": 0.25}}]
    out = merged(asked, "cogvlm", tmp_path / "out")
    before = text_of("cogvlm", folders["cogvlm"], SIZES)
    assert all(same_bits(out[name], before[name]) for name in left)
    second = {name for name in kept if name.startswith("layers.1.")}
    for names, scale in ((kept - second, 1.0), (second, 0.25)):
        shares = exact_shares([[moved[name][model] for name in names] for model in (0, 1)])
        for name in names:
            change = torch.tensor(shares[0]).float() * moved[name][0] + torch.tensor(shares[1]).float() * moved[name][1]
            assert same_bits(out[name], (old[name] + scale * change).to(out[name].dtype)), name


@pytest.mark.parametrize("template", ["cogvlm", "mplug_owl2"])
def test_bits_do_not_depend_on_threads_blocks_or_shards(
    folders: dict[str, Path], template: str, tmp_path: Path
) -> None:
    asked = recipe(folders, template)
    first = merged(asked, template, tmp_path / "first", threads=1)
    again = merged(asked, template, tmp_path / "again", threads=3, block=13, shard_size="1KB")
    assert all(same_bits(again[name], tensor) for name, tensor in first.items())


def test_a_head_that_is_stored_beside_the_embedding_it_is_tied_to_counts_once(tmp_path: Path) -> None:
    """Two files on disk, one tensor of the model."""

    def shares(twice: bool) -> Tensor:
        made = []
        for seed in range(3):
            folder = tmp_path / f"{twice} {seed}"
            write("llama", folder, random_tower(SIZES, seed, dtype=torch.float32), SIZES)
            tensors = load(folder)
            del tensors["lm_head.weight"]
            tensors["model.embed_tokens.weight"] *= 1 + seed
            if twice:
                tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            save_file(tensors, folder / "model.safetensors")
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}), encoding="utf-8")
            made.append(folder)
        asked = {"merge_method": "metagpt", "base_model": str(made[0]), "models": [str(made[1]), str(made[2])]}
        return load(polymerge.merge(asked, tmp_path / f"{twice} out", check=False).folder)["model.norm.weight"]

    assert same_bits(shares(twice=True), shares(twice=False))


def test_half_precision_norms_that_overflow_are_no_nan(tmp_path: Path) -> None:
    """Squares of float16 deltas of 300 are beyond float16, and their sum beyond it long before."""
    base = random_tower(SIZES, 1, dtype=torch.float16)
    folders = [write("llama", tmp_path / "base", base, SIZES)]
    for place, size in enumerate((300.0, 600.0)):
        tower = {name: (tensor + size).half() for name, tensor in base.items()}
        folders.append(write("llava_original", tmp_path / str(place), tower, SIZES))
    squares = torch.tensor([300.0, 600.0], dtype=torch.float16).square()
    assert torch.isinf(squares).all()
    assert torch.isnan(squares / squares.sum()).all(), "in the checkpoint's own precision"
    asked = {"merge_method": "metagpt", "base_model": str(folders[0]), "models": [str(one) for one in folders[1:]]}
    out = text_of("llava_original", polymerge.merge(asked, tmp_path / "out", check=False).folder, SIZES)
    # one fifth of 300 and four fifths of 600, but for the rounding of what was moved
    assert all(torch.allclose(out[name].float(), base[name].float() + 540, atol=1) for name in base)


def test_models_that_have_not_moved_change_nothing(tmp_path: Path) -> None:
    base = random_tower(SIZES, 1)
    folders = [write(layout, tmp_path / layout, base, SIZES) for layout in ("llama", "cogvlm", "mplug_owl2")]
    asked = {"merge_method": "metagpt", "base_model": str(folders[0]), "models": [str(one) for one in folders[1:]]}
    out = text_of("cogvlm", polymerge.merge(asked, tmp_path / "out", check=False).folder, SIZES)
    assert all(same_bits(tensor, base[name.partition("@")[0]]) for name, tensor in out.items())


def test_the_function_alone_takes_the_norms_of_what_it_is_given() -> None:
    deltas = np.array([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]], np.float32)
    assert metagpt(deltas.copy()).tolist() == pytest.approx([2.7, 0.1, 0.0])
    assert metagpt(deltas.copy(), gram=np.diag([1.0, 1.0])).tolist() == [1.5, 0.5, 0.0]
    assert metagpt(np.zeros((2, 3), np.float32)).tolist() == [0.0, 0.0, 0.0]


# --- the other methods of the comparison, on mapped models


@pytest.mark.parametrize("template", ["cogvlm", "mplug_owl2"])
@pytest.mark.parametrize("density", [0.2, 0.55])
def test_a_threshold_over_the_whole_model_is_exact(
    folders: dict[str, Path], template: str, density: float, tmp_path: Path
) -> None:
    old, moved = deltas_of(folders, template)
    asked = recipe(folders, template, merge_method="ties")
    asked["parameters"] = {
        "weight": 1, "density": density, "trim": "model", "elect": "unweighted", "normalize": "none"
    }  # fmt: skip
    out = merged(asked, template, tmp_path / "out", block=100)
    names = list(moved)
    rows = [
        largest(np.concatenate([moved[name][model].numpy().ravel() for name in names]), density) for model in (0, 1)
    ]
    change = elected(rows, [1, 1], "unweighted", "none")
    place = 0
    for name in names:
        size = old[name].numel()
        expected = old[name] + torch.from_numpy(change[place : place + size]).reshape(old[name].shape).float()
        assert same_bits(out[name], expected.to(out[name].dtype)), name
        place += size


def test_every_comparison_plans_one_setting_for_the_whole_tower(folders: dict[str, Path]) -> None:
    for method in ("metagpt", "ties", "dare_linear", "dare_ties", "task_arithmetic"):
        asked = recipe(folders, merge_method=method)
        if method != "metagpt":
            asked["parameters"] = {"weight": 0.5}
        plan = make_plan(asked)
        pieces = list(plan.merged_pieces())
        assert len(pieces) == len(text_of("cogvlm", folders["cogvlm"], SIZES))
        assert {piece.setting for _, piece, _ in pieces} == {0}
        assert all(piece.base is not None for _, piece, _ in pieces)
