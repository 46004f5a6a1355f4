"""What does not fit and cannot be planned: each kind has its message, all are said at once, and nothing is written."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import polymerge
from headers_only import checkpoint, llm, vlm
from polymerge.errors import CheckpointError, Refused
from running import checkpoint as stored
from running import cli, leftovers, linear, merged, raw, recipe_file, small_llama

PROJECTOR = "multi_modal_projector.linear_1.bias"
Q = "self_attn.q_proj.weight"


def recipe_of(*models: Path, method: str = "linear", **fields: Any) -> dict[str, Any]:
    entries = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
    return {"merge_method": method, "models": entries} | fields


def refusal(recipe: Any, status: int = 2) -> list[str]:
    """Everything that is wrong."""
    with pytest.raises(Refused) as refused:
        polymerge.plan(recipe)
    assert refused.value.exit_status == status
    return [str(problem) for problem in refused.value.problems]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return vlm(tmp_path / "vlm"), llm(tmp_path / "llm")


# --- models as wholes


def test_deltas_without_a_base(pair: tuple[Path, Path]) -> None:
    assert refusal(recipe_of(*pair, method="ties")) == [
        "ties works on deltas and needs base_model, their common ancestor"
    ]
    override = [{"layers": 0, "merge_method": "task_arithmetic"}]
    assert refusal(recipe_of(*pair, overrides=override)) == [
        "task_arithmetic works on deltas and needs base_model, their common ancestor"
    ]


@pytest.mark.parametrize(("layers", "message"), [(1, "1 text layers"), (4, "4 text layers")])
def test_depths_that_differ_are_one_problem(tmp_path: Path, layers: int, message: str) -> None:
    recipe = recipe_of(vlm(tmp_path / "vlm"), llm(tmp_path / "deep", layers=layers))
    assert refusal(recipe) == [
        f"depth: 'deep' has {message}, template 'vlm' has 2. Only text towers of equal depth can be merged: choose "
        "another model, or `parts` without text"
    ]


def test_widths_that_differ_are_one_problem(tmp_path: Path) -> None:
    recipe = recipe_of(vlm(tmp_path / "vlm"), llm(tmp_path / "wide", width=16))
    assert refusal(recipe) == [
        "width: the text tower of 'wide' is 16 wide, that of template 'vlm' 8 (text.norm.weight). Only text towers of "
        "equal width can be merged: choose another model, or `parts` without text"
    ]


def test_shapes_that_differ_are_one_problem_for_all_layers(tmp_path: Path) -> None:
    recipe = recipe_of(vlm(tmp_path / "vlm"), llm(tmp_path / "llm", keys=8))
    assert refusal(recipe) == [
        f"text.layers.{{i}}.self_attn.{name}_proj.weight (2 tensors): 'llm' is [8, 8], template 'vlm' is [4, 8]"
        for name in ("k", "v")
    ]


def test_a_vocabulary_of_another_width_does_not_fit_at_all(tmp_path: Path) -> None:
    changed = {"lm_head.weight": ("BF16", (16, 4))}
    recipe = recipe_of(vlm(tmp_path / "vlm"), llm(tmp_path / "llm", more=changed), vocab="overlap")
    assert refusal(recipe) == ["text.lm_head.weight: 'llm' is [16, 4], template 'vlm' is [16, 8]"]


def test_towers_of_two_lineages_are_merged_with_a_warning(tmp_path: Path) -> None:
    heads = {"num_key_value_heads": 32}  # as a Llama has them that says nothing
    plan = polymerge.plan(recipe_of(vlm(tmp_path / "vlm"), llm(tmp_path / "llm", kind="mistral", config=heads)))
    assert plan.warnings == (
        "the text tower of template 'vlm' is a llama, that of 'llm' a mistral: their tensors have the same names, but "
        "a merge only means something if they come from one base",
    )


def test_an_unknown_family_does_not_mix_with_a_known_one(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    names = {"model.layers.0.w.weight": ("F32", (2, 2))}
    strange = checkpoint(tmp_path / "strange", {"model_type": "stranger"}, names)
    silent = checkpoint(tmp_path / "silent", None, names)
    asked = f" ('strange': transformers {transformers.__version__} has no model_type 'stranger')"
    for model, what, more in (
        (strange, "model_type 'stranger'", asked),
        (silent, "no config.json with a model_type", ""),
    ):
        for models, known in (((pair[0], model), "vlm"), ((model, pair[0]), "vlm"), ((model, pair[1]), "llm")):
            family = "llava_next" if known == "vlm" else "llama"
            assert refusal(recipe_of(*models)) == [
                f"'{model.name}' has {what}, which no family table covers, so it only merges with models of identical "
                f"tensor names; '{known}' is of family {family}. Set `family:` for the model if one of `polymerge "
                f"families` has its names, or add a table to src/polymerge/families/tables/{more}"
            ]


def test_a_family_that_the_recipe_names_is_believed(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    unnamed = llm(tmp_path / "unnamed", config={"architectures": ["Mystery"], "model_type": "mystery"})
    recipe = recipe_of(pair[0], unnamed)
    assert "model_type 'mystery'" in refusal(recipe)[0]
    recipe["models"][1]["family"] = "llama"
    assert polymerge.plan(recipe).inputs[1].family == "llama"
    recipe["models"][1]["family"] = "lama"
    assert "'unnamed': no such family 'lama'. Did you mean 'llama'?" in refusal(recipe)


def test_unknown_families_merge_by_identical_names(tmp_path: Path) -> None:
    names = {"a.weight": ("F32", (2, 2)), "b.weight": ("F32", (3,))}
    one, two = (checkpoint(tmp_path / name, {"model_type": "rwkv"}, names) for name in ("one", "two"))
    plan = polymerge.plan(recipe_of(one, two))
    assert plan.counts()["merged"] == 2
    assert (
        "family: generic (no table covers this model_type): tensors are joined by identical names ('one': "
        "RwkvForCausalLM has no place for 2 of its 2 tensors, such as 'a.weight'"
    ) in next(warning for warning in plan.warnings if warning.startswith("family:"))
    assert refusal(recipe_of(one, two, parts=["text"])) == [
        "parts: the template's family is unknown, so its tensors have no parts; use exclude"
    ]
    assert refusal(recipe_of(one, two, overrides=[{"layers": 0, "merge_method": "copy"}])) == [
        "recipe: overrides[0]: layers 0-0, but template 'one' has no text layers"
    ]
    more = checkpoint(tmp_path / "more", {"model_type": "rwkv"}, names | {"c.weight": ("F32", (1,))})
    refused = refusal(recipe_of(one, more))
    assert "c.weight: 'more' has it, template 'one' does not" in refused[0]
    assert "set `missing: copy` to merge what they have in common" in refused[1]


def test_models_of_an_unknown_family_are_merged_in_what_they_have_in_common(tmp_path: Path) -> None:
    config, shared = {"model_type": "stranger"}, {"a.weight": ("F32", (2, 2))}
    one = checkpoint(tmp_path / "one", config, shared | {"b.weight": ("F32", (3,))})
    two = checkpoint(tmp_path / "two", config, shared | {"c.weight": ("F32", (1,))})
    plan = polymerge.plan(recipe_of(one, two, missing="copy"))
    fates = {step.name: (step.fate, step.reason) for step in plan.steps}
    assert fates["a.weight"][0] == "merged"
    assert fates["b.weight"] == ("copied", "'two' has no such tensor, and missing: copy")
    assert {(left.name, left.reason) for left in plan.left_out} >= {("c.weight", "the template has no such tensor")}
    assert plan.recipe["missing"] == "copy"
    assert "recipe: missing has to be error or copy" in refusal(recipe_of(one, two, missing="leave"))[0]
    wide = checkpoint(tmp_path / "wide", config, {"a.weight": ("F32", (2, 3))})
    assert "a.weight" in refusal(recipe_of(one, wide, missing="copy"))[0]


def test_a_known_model_may_lack_tensors_where_the_recipe_says_so(tmp_path: Path) -> None:
    lacking = f"model.layers.1.{Q}"
    recipe = recipe_of(vlm(tmp_path / "vlm"), llm(tmp_path / "llm", without=[lacking]), missing="copy")
    fates = {step.canonical: step.fate for step in polymerge.plan(recipe).steps}
    assert (fates[f"text.layers.1.{Q}"], fates[f"text.layers.0.{Q}"]) == ("copied", "merged")


def test_quantized_models_are_refused(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    method, numbers = {"quantization_config": {"quant_method": "gptq"}}, {f"model.layers.0.{Q}": ("I32", (8, 1))}
    packed = llm(tmp_path / "packed", config=method, more=numbers)
    assert refusal(recipe_of(pair[0], packed)) == [
        f"'packed' ({packed}) is quantized (gptq): its numbers cannot be merged. Use the unquantized checkpoint"
    ]


# --- tensors


def test_a_tensor_that_a_model_lacks(tmp_path: Path) -> None:
    lacking = [f"model.layers.{layer}.{Q}" for layer in (0, 1)]
    recipe = recipe_of(vlm(tmp_path / "vlm"), llm(tmp_path / "llm", without=lacking))
    assert refusal(recipe) == [
        f"text.layers.{{i}}.{Q} (2 tensors): template 'vlm' has it, 'llm' does not. If it may stay the template's, "
        "name it in exclude"
    ]
    plan = polymerge.plan(recipe | {"exclude": [f"text.layers.*.{Q}"]})
    assert plan.counts()["merged"] == 19


def test_a_tensor_that_only_a_model_has_would_be_lost(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    biases: Any = {f"model.layers.{layer}.self_attn.q_proj.bias": ("BF16", (8,)) for layer in (0, 1)}
    biased = llm(tmp_path / "biased", more=biases)
    assert refusal(recipe_of(pair[0], biased)) == [
        "text.layers.{i}.self_attn.q_proj.bias (2 tensors): 'biased' has it, template 'vlm' does not, so it would be "
        "lost. If that is intended, name it in exclude"
    ]
    plan = polymerge.plan(recipe_of(pair[0], biased, exclude=["*.bias"]))
    assert {entry.reason for entry in plan.left_out if entry.name in biases} == {"excluded by the recipe"}
    plan = polymerge.plan(recipe_of(*pair, method="ties", base_model=str(biased)))
    assert {entry.reason for entry in plan.left_out if entry.name in biases} == {"the template has no such tensor"}


def test_a_base_has_to_have_what_is_merged(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base = llm(tmp_path / "base", without=["model.norm.weight"])
    (problem,) = refusal(recipe_of(*pair, method="ties", base_model=str(base)))
    assert problem.startswith("text.norm.weight: template 'vlm' has it, 'base' does not.")


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "U8", "BOOL"])
def test_dtypes_without_arithmetic_are_not_merged(tmp_path: Path, dtype: str) -> None:
    packed: Any = {f"model.layers.{layer}.{Q}": (dtype, (8, 8)) for layer in (0, 1)}
    template, model = vlm(tmp_path / "vlm"), llm(tmp_path / "llm", more=packed)
    message = "which cannot be merged (F64, F32, F16 and BF16 can). Name it in exclude to keep the template's"
    assert refusal(recipe_of(template, model)) == [
        f"text.layers.{{i}}.{Q} (2 tensors): 'llm' holds it as {dtype}, {message}"
    ]
    assert refusal(recipe_of(model, llm(tmp_path / "plain"))) == [
        f"text.layers.{{i}}.{Q} (2 tensors): 'llm' holds it as {dtype}, {message}"
    ]


def test_names_that_no_rule_explains(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    odd = llm(tmp_path / "odd", more={"adapter.weight": ("F32", (1,))})
    (problem,) = refusal(recipe_of(pair[0], odd), status=1)
    assert problem.startswith(f"'odd' ({odd}): no rule of family 'llama' explains tensor 'adapter.weight'.")
    (problem,) = refusal(recipe_of(odd, pair[1]), status=1)
    assert "explains tensor 'adapter.weight'" in problem


# --- the recipe against the models


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exclude": ["text.lm_head"]},
         "recipe: exclude: 'text.lm_head' matches no tensor; globs are matched against entire canonical names. Did "),
        ({"exclude": ["zzz.*"]},
         "recipe: exclude: 'zzz.*' matches no tensor; globs are matched against entire canonical names, such as "
         "projector.image_newline"),
        ({"overrides": [{"match": "text.layer.*", "merge_method": "copy"}]},
         "recipe: overrides: 'text.layer.*' matches no tensor"),
        ({"overrides": [{"layers": "0-2", "merge_method": "copy"}]},
         "recipe: overrides[0]: layers 0-2, but template 'vlm' has layers 0-1"),
        ({"parts": ["text", "audio"]}, "parts: 'vlm' has no part 'audio'\nparts: 'llm' has no part 'audio'"),
        ({"parts": ["vision"]}, "parts: 'llm' has no part 'vision'"),
        ({"exclude": ["*"]}, "nothing would be merged: every tensor of the template would be copied"),
        ({"overrides": [{"match": "*", "merge_method": "copy"}]}, "nothing would be merged"),
    ],
)  # fmt: skip
def test_a_recipe_that_does_not_fit_its_models(pair: tuple[Path, Path], fields: Any, message: str) -> None:
    found = refusal(recipe_of(*pair, **fields))
    assert len(found) == len(message.split("\n"))
    assert all(part in problem for part, problem in zip(message.split("\n"), found, strict=True))


def test_a_recipe_with_nothing_but_the_base(tmp_path: Path) -> None:
    base = llm(tmp_path / "base")
    recipe = {"merge_method": "ties", "models": [str(base)], "base_model": str(base)}
    assert refusal(recipe) == ["recipe: models lists only the base"]


# --- all at once


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    template = vlm(tmp_path / "vlm")
    one = llm(tmp_path / "one", layers=3, more={"strange.weight": ("F32", (1,))})
    two = llm(tmp_path / "two", keys=8, without=["model.norm.weight"])
    models = [str(template), {"model": str(one), "parameters": {"weight": "x"}}, str(two)]
    found = refusal({
        "merge_method": "tise", "models": models, "exclude": ["nothing.*"], "seed": -1, "tokenizer": {"tokens": {}},
        "overrides": [{"layers": "0-9", "parameters": {"density": 2}}],
    })  # fmt: skip
    for said in (
        "there is no method 'tise'", "'tokens' is not supported", "seed has to be an integer",
        "depth: 'one' has 3", "explains tensor 'strange.weight'", "{i}.self_attn.k_proj.weight (2 tensors): 'two'",
        "text.norm.weight: template 'vlm' has it, 'two' does not", "'nothing.*' matches no tensor",
        "weight has to be a number, got 'x'", "density of ties has to be from 0 to 1",
        "ties works on deltas and needs base_model",
        "layers 0-9, but template 'vlm' has layers 0-1", "models[0] 'vlm': ties needs `weight`",
    ):  # fmt: skip
        assert sum(said in problem for problem in found) >= 1, said


def test_a_broken_checkpoint_alone_is_not_the_recipe_s_fault(tmp_path: Path) -> None:
    template, broken, cut = vlm(tmp_path / "vlm"), llm(tmp_path / "broken"), llm(tmp_path / "cut", shards=2)
    (broken / "model.safetensors").write_bytes(b"\x00" * 4)
    (cut / "model-00002-of-00002.safetensors").unlink()
    recipe = recipe_of(template, broken, cut)
    with pytest.raises(Refused) as refused:
        polymerge.plan(recipe)
    assert refused.value.exit_status == 1
    assert {type(problem) for problem in refused.value.problems} == {CheckpointError}
    assert all(any(folder.name in str(problem) for problem in refused.value.problems) for folder in (broken, cut))
    found = refusal(recipe | {"seed": -1}, status=2)
    assert len(found) == len(refused.value.problems) + 1
    assert any(
        "there is no such file or folder" in problem for problem in refusal(recipe_of(template, tmp_path / "no"))
    )


# --- from the command line, before anything is written


def fails_to_plan(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tmp_path: Path, **more: Any) -> str:
    models = stored(tmp_path / "one", one), stored(tmp_path / "other", other)
    asked = recipe_file(linear(*models, **more), tmp_path / "r.yaml")
    planned, ran = cli("plan", asked), cli("merge", asked, "-o", tmp_path / "out")
    assert planned.status == ran.status == 2
    assert planned.err == ran.err
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == []
    return ran.err


def test_the_command_line_says_all_of_it(tmp_path: Path) -> None:
    one, other = small_llama(1), small_llama(2)
    other["model.layers.0.mlp.up_proj.weight"] = torch.ones(8, 6)
    del other["model.layers.1.mlp.up_proj.weight"]
    other["model.layers.1.mlp.gate_proj.weight"] = torch.ones(9, 6)
    more = {"exclude": ["text.lm_heads.*"], "modell": 1, "overrides": [{"layers": "8-9", "merge_method": "copy"}]}
    said = fails_to_plan(one, other, tmp_path, **more)
    for problem in (
        "text.layers.{i}.mlp.up_proj.weight: 'other' is [8, 6], template 'one' is [9, 6]",
        "text.layers.{i}.mlp.up_proj.weight: template 'one' has it, 'other' does not",
        "text.layers.{i}.mlp.gate_proj.weight: 'other' has it, template 'one' does not",
        "'text.lm_heads.*' matches no tensor",
        "unknown field 'modell' is not supported. Did you mean 'models'",
        "layers 8-9, but template 'one' has layers 0-1",
    ):
        assert problem in said


def test_a_packed_template_is_told_by_its_dtype_and_not_by_its_shapes(tmp_path: Path) -> None:
    packed = small_llama(1)
    packed["model.layers.1.mlp.up_proj.weight"] = torch.ones(27, 1, dtype=torch.uint8)
    said = fails_to_plan(packed, small_llama(2), tmp_path)
    assert said.startswith("polymerge: 1 problem")
    assert "'one' holds it as U8, which cannot be merged" in said


# --- tensors that nobody calculates with

PACKED = {
    "F8_E4M3": (torch.uint8, (4, 6), 24),
    "F8_E5M2": (torch.uint8, (4, 6), 24),
    "I8": (torch.int8, (4, 6), 24),
    "I32": (torch.int32, (4, 2), 32),
    "U8": (torch.uint8, (5,), 5),
    "BOOL": (torch.bool, (3, 1), 3),
    "F4": (torch.uint8, (4, 3), 6),
    "F6_E2M3": (torch.uint8, (4, 3), 9),
    "I64": (torch.int64, (), 8),
}


def with_packed(folder: Path, dtype: str, seed: int) -> Path:
    """A Llama of one merged and one packed tensor, written by hand, since torch has not all of these dtypes."""
    _, shape, size = PACKED[dtype]
    generator = torch.Generator().manual_seed(seed)
    norm = torch.randn(8, generator=generator).bfloat16().view(torch.uint8).numpy().tobytes()
    packed = bytes(torch.randint(0, 2 if dtype == "BOOL" else 256, (size,), generator=generator).tolist())
    header = {
        "model.norm.weight": {"dtype": "BF16", "shape": [8], "data_offsets": [0, 16]},
        "model.layers.0.packed": {"dtype": dtype, "shape": list(shape), "data_offsets": [16, 16 + size]},
    }
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + norm + packed)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.mark.parametrize("dtype", PACKED)
def test_packed_tensors_are_copied_as_they_are_or_refused_by_name(dtype: str, tmp_path: Path) -> None:
    one, other = with_packed(tmp_path / "one", dtype, 1), with_packed(tmp_path / "other", dtype, 2)
    ran = cli("merge", recipe_file(linear(one, other), tmp_path / "r.yaml"), "-o", tmp_path / "out")
    assert ran.status == 2
    assert f"'one' holds it as {dtype}, which cannot be merged" in ran.err
    assert "text.layers.{i}.packed" in ran.err
    assert not (tmp_path / "out").exists()
    out = merged(linear(one, other, exclude=["text.layers.0.packed"]), tmp_path / "out", "--no-verify")
    assert raw(out)["model.layers.0.packed"] == raw(one)["model.layers.0.packed"]
    assert raw(out)["model.norm.weight"] != raw(one)["model.norm.weight"]
