"""What decomposing matrices takes: told by shapes, from headers alone, and without torch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import polymerge
from headers_only import Shapes, checkpoint
from polymerge.methods.table import METHODS
from polymerge.planning import Plan, matrix_costs
from polymerge.planning.matrix_costs import Matrices, cost_words, decomposed, is_matrix, room_for_matrices
from polymerge.planning.text import describe
from running import loaded_by

HIDDEN, INNER, ROWS, LAYERS = 3584, 18944, 152064, 28
CONFIG = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": LAYERS}


def qwen(layers: int) -> Shapes:
    """The tensors of Qwen2 7B, or of some of its layers."""
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (HIDDEN,),
        "mlp.down_proj.weight": (HIDDEN, INNER),
        "mlp.gate_proj.weight": (INNER, HIDDEN),
        "mlp.up_proj.weight": (INNER, HIDDEN),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.k_proj.weight": (512, HIDDEN),
        "self_attn.k_proj.bias": (512,),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.v_proj.weight": (512, HIDDEN),
    }
    shapes = {
        "model.embed_tokens.weight": (ROWS, HIDDEN),
        "lm_head.weight": (ROWS, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    shapes |= {f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in layer.items()}
    return {name: ("BF16", shape) for name, shape in shapes.items()}


def recipe(folder: Path, method: str, models: int, layers: int = LAYERS) -> dict[str, Any]:
    names = ["base", *(f"tuned{number}" for number in range(models))]
    config = {**CONFIG, "num_hidden_layers": layers}
    base, *tuned = (str(checkpoint(folder / name, config, qwen(layers))) for name in names)
    weight = {} if method == "iso_c" else {"parameters": {"weight": 1.0}}
    entries = [{"model": model, **weight} for model in tuned]
    return {"merge_method": method, "base_model": base, "models": entries}


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plan]:
    folder = tmp_path_factory.mktemp("seven billion")
    return {name: polymerge.plan(recipe(folder / name, name, 5)) for name in ("tsv", "iso_c", "task_arithmetic")}


def seconds(plan: Plan) -> float:
    return sum(matrices.seconds for _, matrices in decomposed(plan))


def test_a_plan_of_seven_billion_says_what_it_costs(plans: dict[str, Plan]) -> None:
    assert (
        cost_words(plans["tsv"])
        == "196 matrices, about 5.8 core hours; memory: 1.7 GB, up to 19.6 GB for several at once"
    )
    assert cost_words(plans["iso_c"]) == (
        "196 matrices, about 50 core minutes; memory: 1.6 GB, up to 19.6 GB for several at once"
    )
    assert seconds(plans["tsv"]) == pytest.approx(7 * seconds(plans["iso_c"]))
    assert f"cost: {cost_words(plans['tsv'])}\nhash: " in describe(plans["tsv"])
    assert "memory: about" not in describe(plans["tsv"])
    assert cost_words(plans["task_arithmetic"]) == ""
    assert "memory: about" in describe(plans["task_arithmetic"])


def test_the_embedding_and_vectors_are_none(plans: dict[str, Plan]) -> None:
    held = {piece.canonical.rpartition(".layers.")[2].partition(".")[2] for piece, _ in decomposed(plans["tsv"])}
    assert held == {f"mlp.{name}_proj.weight" for name in ("down", "gate", "up")} | {
        f"self_attn.{name}_proj.weight" for name in "koqv"
    }
    assert plans["tsv"].settings[1].method == "task_arithmetic"


@pytest.mark.parametrize(
    ("name", "shape", "whole"),
    [
        ("vision.blocks.0.attn.qkv.weight", (12, 4), True),
        ("text.layers.0.mlp.experts.3.up_proj.weight", (12, 4), True),
        ("model.layers.0.mlp.experts.gate_up_proj", (3, 12, 4), True),
        ("model.experts_of_another_kind", (3, 12, 4), False),
        ("audio.conv1.weight", (12, 4, 3), False),
        ("vision.patch_embed.proj.weight", (12, 3, 2, 14, 14), False),
        ("text.norm.weight", (12,), False),
        ("text.layers.0.mlp.shared_expert_gate.weight", (1, 12), False),
        ("x", (12, 1), False),
        ("x", (0, 12), False),
        ("x", (), False),
        ("text.embed_tokens.weight", (12, 4), False),
        ("text.lm_head.weight", (12, 4), False),
    ],
)
def test_what_a_matrix_is(name: str, shape: tuple[int, ...], whole: bool) -> None:
    assert is_matrix(name, shape) is whole


def test_matrices_are_merged_at_once_as_far_as_memory_allows(
    plans: dict[str, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = max(matrices.room for _, matrices in decomposed(plans["tsv"]))
    most = (5 + 4) * ROWS * HIDDEN * 4
    for free, room in ((10**12, most), (10 * 10**9, 5 * 10**9), (10**9, largest), (0, largest)):
        monkeypatch.setattr(matrix_costs, "free_memory", lambda free=free: free)
        assert room_for_matrices(plans["tsv"]) == room
    assert room_for_matrices(plans["task_arithmetic"]) == 0


def test_the_memory_that_is_free_is_known() -> None:
    assert 1 << 20 < matrix_costs.free_memory() < 1 << 50


def test_a_method_may_decompose_the_side_of_the_inputs() -> None:
    row = METHODS["iso_c"]
    inputs = replace(row, decomposes_inputs=True)
    assert Matrices(1, 100, 700, 2, 4, row).side == 100
    assert Matrices(1, 100, 700, 2, 4, inputs).side == 200
    assert Matrices(1, 700, 100, 2, 4, inputs).side == 100
    assert Matrices(1, 100, 700, 2, 4, inputs).seconds > 4 * Matrices(1, 100, 700, 2, 4, row).seconds
    assert Matrices(3, 100, 700, 2, 4, row).seconds == pytest.approx(3 * Matrices(1, 100, 700, 2, 4, row).seconds)


def test_a_calibration_takes_a_decomposition_and_products_with_each_model() -> None:
    row, decomposition = METHODS["task_arithmetic"], Matrices(1, 100, 700, 2, 4, METHODS["iso_c"]).seconds
    two, four = (Matrices(1, 100, 700, models, 4, row, True).seconds - decomposition for models in (2, 4))
    assert 0 < two == pytest.approx(four / 2)
    assert Matrices(1, 100, 700, 2, 4, row).seconds == 0


def test_what_is_held_beside_the_deltas_is_the_row_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_costs, "_WITHOUT_SCIPY", 0.0)
    row = replace(METHODS["iso_c"], holds=(1.0, 2.0), holds_below=5.0)
    blocks = matrix_costs._BLOCKS
    assert Matrices(1, 100, 700, 2, 4, row).room == 3 * 4 * 100 * 700 + 2 * 8 * 100**2 + blocks
    assert Matrices(1, 100, 700, 2, 8, row).room == 3 * 8 * 100 * 700 + 2 * 8 * 100**2 + blocks
    inputs = replace(row, decomposes_inputs=True)
    assert Matrices(1, 100, 700, 2, 4, inputs).room == 3 * 4 * 100 * 700 + 5 * 8 * 200**2 + blocks
    assert Matrices(1, 700, 100, 2, 4, inputs).room == 3 * 4 * 100 * 700 + 2 * 8 * 100**2 + blocks
    # calibration has the merged matrix beside the deltas, which are read again
    assert Matrices(1, 100, 100, 2, 4, row, True).room == 3 * 4 * 100**2 + 3.4 * 8 * 100**2 + blocks
    monkeypatch.setattr(matrix_costs, "_WITHOUT_SCIPY", 3.0)
    assert Matrices(1, 100, 700, 2, 4, row).room == 3 * 4 * 100 * 700 + 5 * 8 * 100**2 + blocks
    monkeypatch.setattr(matrix_costs, "_WITHOUT_SCIPY", 0.0)
    one_by_one = METHODS["task_arithmetic"]
    assert Matrices(1, 700, 100, 2, 4, one_by_one, True).room == 4 * 4 * 100 * 700 + blocks


def test_small_ones_take_seconds(tmp_path: Path) -> None:
    found = polymerge.plan(recipe(tmp_path, "iso_c", 2, layers=1))
    assert cost_words(replace(found, steps=found.steps[:6])).startswith("2 matrices, about 52 core seconds; memory: ")
    only = [step for step in found.steps if step.name.endswith(("k_proj.weight", "model.norm.weight"))]
    assert cost_words(replace(found, steps=tuple(only))).startswith(
        "1 matrix, about 0.089 core seconds; memory: 32.1 MB"
    )


def test_no_torch_is_needed_to_plan(tmp_path: Path) -> None:
    said = json.dumps(recipe(tmp_path, "tsv", 2, layers=1))
    code = "import json, polymerge; from polymerge.planning.text import describe"
    loaded = loaded_by(f"{code}; describe(polymerge.plan(json.loads({said!r})))")
    assert "polymerge" in loaded
    assert not {"torch", "transformers"} & loaded
