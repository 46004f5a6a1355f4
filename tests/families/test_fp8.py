"""Weights in fp8 and their scales are found, or refused all at once with what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import polymerge
from headers_only import checkpoint, decoder, llm
from polymerge.checkpoints.tensor_info import TensorInfo
from polymerge.errors import RecipeError, Refused
from polymerge.families.expressions import Read, Scaled, expr_from_json, expr_to_json
from polymerge.families.fp8 import read_fp8
from running import cli, recipe_file

W = "model.layers.0.mlp.up_proj.weight"
Q = "model.layers.1.self_attn.q_proj.weight"


def entries(**tensors: tuple[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, dtype, shape, Path("f"), 0, 0) for name, (dtype, shape) in tensors.items()}


def scaled(weight: tuple[int, ...], scale: tuple[int, ...], **said: Any) -> Scaled | None:
    """How a weight is read whose scales have some shape."""
    found = read_fp8(
        {"text_config": {"quantization_config": said}} if said else {},
        entries(w=("F8_E4M3", weight), w_scale=("F32", scale)),
    )
    assert bool(found.problems) == (not found.scaled)
    return found.scaled.get("w")


@pytest.mark.parametrize(
    ("weight", "scale", "said", "block"),
    [
        ((300, 200), (), {}, (300, 200)),
        ((300, 200), (1,), {}, (300, 200)),
        ((300, 200), (1, 1), {}, (300, 200)),
        ((300, 200), (300,), {}, (1, 200)),
        ((300, 200), (300, 1), {}, (1, 200)),
        ((300, 200), (1, 200), {}, (300, 1)),
        ((300, 200), (3, 2), {}, (128, 128)),
        ((300, 100), (3, 1), {}, (128, 100)),
        ((300, 200), (5, 4), {"weight_block_size": [64, 64]}, (64, 64)),
        ((300, 200), (3, 2), {"weight_block_size": [64, 64]}, None),
        ((300, 200), (5, 4), {}, None),
        ((300, 200), (200,), {}, None),
        ((300, 200), (300, 7), {"config_groups": {"a": {"weights": {"group_size": 32}}}}, (1, 32)),
        ((300, 200), (3, 4), {"config_groups": {"a": {"weights": {"block_structure": [100, 50]}}}}, (100, 50)),
        ((4, 300, 200), (4, 3, 2), {}, (1, 128, 128)),
        ((4, 300, 200), (4,), {}, (1, 300, 200)),
        ((4, 300, 200), (4, 1, 200), {}, (1, 300, 1)),
        ((4, 300, 200), (4, 300), {}, (1, 1, 200)),
        ((4, 300, 200), (2, 3, 2), {}, None),
        ((300, 200), (3, 1, 2, 1), {}, (128, 128)),
        ((300, 200), (3, 1, 2, 2), {}, None),
        ((300,), (300,), {}, None),
        ((300,), (), {}, None),
        ((8, 3, 2, 2), (), {}, None),
    ],
)
def test_the_shape_of_scales_says_what_each_is_for(
    weight: tuple[int, ...], scale: tuple[int, ...], said: dict[str, Any], block: tuple[int, ...] | None
) -> None:
    assert scaled(weight, scale, **said) == (None if block is None else Scaled(Read("w"), "w_scale", block))


@pytest.mark.parametrize(
    ("weight", "scale", "block"),
    [
        ((300, 64), (300, 2), (1, 32)),
        ((300, 200), (300, 7), (1, 32)),
        ((4, 300, 64), (4, 300, 2), (1, 1, 32)),
        ((300, 64), (300, 4), None),
        ((300, 64), (300, 1), None),
        ((300, 64), (), None),
    ],
)
def test_bytes_are_exponents_where_they_are_for_32_elements_each(
    weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, ...] | None
) -> None:
    found = read_fp8({}, entries(w=("F8_E4M3", weight), w_scale=("U8", scale)))
    assert found.scaled == ({"w": Scaled(Read("w"), "w_scale", block)} if block else {})
    assert found.problems == (() if block else (
        "'w' is F8_E4M3 with scales of dtype U8. Download it again, or use the unquantized checkpoint",
    ))  # fmt: skip


@pytest.mark.parametrize("said", [{"weight_block_size": "128"}, {"weight_block_size": [0, 1]}, {"config_groups": [1]}])
def test_settings_that_make_no_sense_are_as_if_not_there(said: dict[str, Any]) -> None:
    assert scaled((300, 200), (3, 2), **said) == Scaled(Read("w"), "w_scale", (128, 128))


@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        ("a.weight", "a.weight_scale_inv"),
        ("a.weight", "a.weight_scale"),
        ("a.weight", "a.scale"),
        ("a.weight", "a.qscale_weight"),
        ("a.gate_up_proj", "a.gate_up_proj_scale_inv"),
        ("a.gate_up_proj", "a.gate_up_proj_scale"),
    ],
)
def test_scales_are_found_by_their_names(weight: str, scale: str) -> None:
    assert read_fp8({}, entries(**{weight: ("F8_E5M2", (4, 4))})) == read_fp8({}, {})  # bits, and no more
    found = read_fp8({}, entries(**{weight: ("F8_E5M2", (4, 4)), scale: ("BF16", ()), "b.weight": ("BF16", (4,))}))
    assert (list(found.scaled), found.beside, found.problems) == ([weight], {scale}, ())


def test_scales_of_activations_and_of_caches_are_left_out() -> None:
    named = ("a.input_scale", "a.activation_scale", "a.input_scale_ub", "e.gate_up_proj_input_scale", "x.k_scale")
    held = entries(
        **{"a.weight": ("F8_E4M3", (4, 4)), "a.weight_scale": ("F32", ()), "e.gate_up_proj": ("F8_E4M3", (2, 4, 4))},
        **{"e.gate_up_proj_scale": ("F32", (2, 1, 1)), "b.input_scale": ("F32", ()), "y.k_scale": ("F32", (4,))},
        **dict.fromkeys(named, ("F32", (1,))),
    )
    found = read_fp8({}, held)
    assert set(found.dropped) == set(named)
    assert found.beside == {*named, "a.weight_scale", "e.gate_up_proj_scale"}


@pytest.mark.parametrize("kept", ["F8_E4M3", "BF16"])
@pytest.mark.parametrize("setting", ["kv_cache_scheme", "kv_cache_quant_algo"])
def test_a_config_that_quantizes_caches_explains_their_scales(setting: str, kept: str) -> None:
    named = {"x.k_scale": ("F32", (4, 1, 1)), "x.v_scale": ("F32", ()), "x.k_zero_point": ("I8", (4,))}
    held = entries(**{"a.weight": (kept, (4, 4))}, **named)
    held |= entries(**{"a.weight_scale": ("F32", ())} if kept == "F8_E4M3" else {})
    found = read_fp8({"quantization_config": {"quant_method": "any", setting: {"num_bits": 8}}}, held)
    assert (set(found.dropped), found.problems) == (set(named), ())
    assert set(read_fp8({"quantization_config": {"quant_method": "any", setting: None}}, held).dropped) == (
        {"x.v_scale"} if kept == "F8_E4M3" else set()
    )


def test_a_checkpoint_without_fp8_has_none_of_this() -> None:
    held = entries(**{"a.weight": ("BF16", (4, 4)), "a.input_scale": ("F32", ()), "a.weight_scale": ("F32", ())})
    assert read_fp8({}, held) == read_fp8({}, {})


def test_the_expression_has_a_form_in_json() -> None:
    expr = Scaled(Read("w"), "w_scale", (1, 128, 128))
    assert expr_from_json(expr_to_json(expr)) == expr
    with pytest.raises(RecipeError, match=r"block \[0\]"):
        expr_from_json({"scaled": "w", "by": "s", "block": [0]})


# --- what is refused


def model(folder: Path, more: dict[str, tuple[str, tuple[int, ...]]], **said: Any) -> Path:
    """A Llama with other tensors in place of some of its own, or beside them."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, **said}
    plain = {f"model.{name}": entry for name, entry in decoder(2, 8, 12, 4, 16, "BF16").items()}
    return checkpoint(folder, config, {**plain, "lm_head.weight": ("BF16", (16, 8)), **more})


def said_of(tmp_path: Path, more: dict[str, tuple[str, tuple[int, ...]]], **said: Any) -> tuple[str, ...]:
    asked = {"merge_method": "linear", "models": [str(llm(tmp_path / "a")), str(model(tmp_path / "b", more, **said))]}
    with pytest.raises(Refused) as refused:
        polymerge.plan({**asked, "parameters": {"weight": 0.5}})
    return tuple(map(str, refused.value.problems))


def test_all_that_is_wrong_with_scales_is_said_at_once(tmp_path: Path) -> None:
    said = said_of(
        tmp_path,
        {
            W: ("F8_E4M3", (12, 8)),
            Q: ("F8_E4M3", (8, 8)),
            f"{Q}_scale_inv": ("U8", ()),
            "model.layers.0.mlp.gate_proj.weight_scale_inv": ("F32", ()),
            "model.layers.9.mlp.gate_proj.weight_scale_inv": ("F32", ()),
            "model.layers.0.mlp.down_proj.weight": ("F8_E5M2", (8, 12)),
            "model.layers.0.mlp.down_proj.weight_scale": ("F32", (5, 5)),
            "model.layers.1.mlp.down_proj.weight": ("F8_E5M2", (8, 12)),
            "model.layers.1.mlp.down_proj.weight_scale": ("F32", ()),
            "model.layers.1.mlp.down_proj.weight_scale_inv": ("F32", ()),
        },
        quantization_config={"quant_method": "fp8"},
    )
    assert [one.partition("): ")[2].partition(". Download it again")[0] for one in said] == [
        "'model.layers.0.mlp.down_proj.weight' is F8_E5M2 with scales that are not one for the tensor, for each row or "
        "for each block of 128 x 128: [5, 5] for [8, 12]",
        f"'{W}' is F8_E4M3 without a scale",
        "'model.layers.1.mlp.down_proj.weight' is F8_E5M2 with 2 scales each",
        f"'{Q}' is F8_E4M3 with scales of dtype U8",
        "'model.layers.0.mlp.gate_proj.weight_scale_inv': scales of weights that are plain (BF16)",
        "'model.layers.9.mlp.gate_proj.weight_scale_inv': scales of weights that are not there",
    ]


def test_what_is_packed_in_another_way_beside_fp8_is_still_refused(tmp_path: Path) -> None:
    fp8 = {W: ("F8_E4M3", (12, 8)), f"{W}_scale": ("F32", ())}
    (said,) = said_of(tmp_path, {**fp8, Q: ("I8", (8, 8)), f"{Q}_scale": ("F32", (8, 1))})
    assert f"is quantized (int8; {Q} is I8): its numbers cannot be merged" in said


def test_rotated_weights_are_refused(tmp_path: Path) -> None:
    fp8 = {W: ("F8_E4M3", (12, 8)), f"{W}_scale": ("F32", ())}
    settings = {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {}}}}
    (said,) = said_of(tmp_path, fp8, quantization_config=settings)
    assert "its weights were rotated before they were quantized (transform_config)" in said


def test_what_scales_alone_do_not_make_numbers_of_is_refused(tmp_path: Path) -> None:
    fp8: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, rows, more in ((W, 12, "weight_zero_point"), (Q, 8, "pre_quant_scale")):
        fp8 |= {name: ("F8_E4M3", (rows, 8)), f"{name}_scale": ("F32", ())}
        fp8[name.removesuffix("weight") + more] = ("F32", (8,))
    said = said_of(tmp_path, fp8, quantization_config={"quant_method": "modelopt"})
    assert [one.partition("): ")[2] for one in said] == [
        f"'{W}' is quantized with zero points besides scales. Use the unquantized checkpoint",
        f"'{Q}' is for inputs that are scaled first (pre_quant_scale). Use the unquantized checkpoint",
    ]


def test_fp8_is_no_dtype_of_an_output(tmp_path: Path) -> None:
    one, other = llm(tmp_path / "one"), llm(tmp_path / "other")
    asked = {"merge_method": "linear", "models": [str(one), str(other)], "parameters": {"weight": 0.5}}
    ran = cli("plan", recipe_file(asked | {"dtype": "float8_e4m3fn"}, tmp_path / "recipe.yaml"))
    assert ran.status == 2
    assert "cannot merge to 'float8_e4m3fn'" in ran.err


# --- what the plan and inspect say


def test_a_plan_says_what_became_of_every_scale(tmp_path: Path) -> None:
    fp8: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in (W, Q):
        rows = 12 if name == W else 8
        fp8 |= {name: ("F8_E4M3", (rows, 8)), f"{name}_scale_inv": ("F32", ())}
    fp8["model.layers.0.mlp.up_proj.input_scale"] = ("F32", ())
    source = model(tmp_path / "b", fp8, quantization_config={"quant_method": "fp8"})
    template = llm(tmp_path / "a")
    plan = polymerge.plan(
        {
            "merge_method": "linear",
            "template": str(template),
            "models": [str(template), str(source)],
            "exclude": ["text.layers.1.*"],
            "parameters": {"weight": 0.5},
        }
    )
    reasons = {left.name: left.reason for left in plan.left_out if "scale" in left.name}
    assert reasons == {
        f"{Q}_scale_inv": "the template's is kept: excluded by the recipe",
        "model.layers.0.mlp.up_proj.input_scale": "scales activations, which the output computes with as they are",
    }
    said = [warning for warning in plan.warnings if "'b'" in warning]
    assert any("2 of its tensors are quantized (F8_E4M3, a scale for each tensor)" in one for one in said)
    assert not any("output is not quantized" in one for one in plan.warnings)
    step = next(step for step in plan.steps if step.name == W)
    assert (step.fate, step.dtype) == ("merged", "BF16")
    again = polymerge.plan(plan.to_json())
    assert again.hash == plan.hash


@pytest.mark.parametrize(
    ("recipe", "config", "dtype"),
    [
        (None, {}, "BF16"),
        ("float32", {}, "F32"),
        (None, {"torch_dtype": "float16"}, "F16"),
        (None, {"dtype": "float32"}, "BF16"),
    ],
)
def test_a_template_in_fp8_is_written_as_numbers(
    recipe: str | None, config: dict[str, str], dtype: str, tmp_path: Path
) -> None:
    fp8: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, rows in ((W, 12), (Q, 8)):
        fp8 |= {name: ("F8_E4M3", (rows, 8)), f"{name}_scale_inv": ("F32", ())}
    template = model(tmp_path / "b", fp8, quantization_config={"quant_method": "fp8"}, **config)
    plan = polymerge.plan(
        {
            "merge_method": "linear",
            "template": str(template),
            "models": [str(template), str(llm(tmp_path / "a"))],
            "exclude": ["text.layers.1.*"],
            "parameters": {"weight": 0.5},
        }
        | ({"dtype": recipe} if recipe else {})
    )
    steps = {step.name: step for step in plan.steps}
    assert not any("scale" in name for name in steps)
    assert (steps[W].fate, steps[W].dtype, steps[W].source_dtype) == ("merged", dtype, "F8_E4M3")
    assert (steps[Q].fate, steps[Q].dtype) == ("dequantized", dtype)
    assert steps["model.layers.1.self_attn.k_proj.weight"].fate == "copied"
    assert "the output is not quantized, and its config.json lacks quantization_config" in plan.warnings


def test_inspect_says_fp8_and_the_kind_of_scales(tmp_path: Path) -> None:
    fp8: dict[str, tuple[str, tuple[int, ...]]] = {W: ("F8_E4M3", (12, 8)), f"{W}_scale": ("F32", (12, 1))}
    ran = cli("inspect", model(tmp_path / "b", fp8), llm(tmp_path / "a"))
    assert ran.status == 0, ran.err
    assert "1 F8_E4M3" in ran.out
    assert "1 of its tensors is quantized (F8_E4M3, a scale for each row)" in ran.out
    assert "a can be merged into b" in ran.out
