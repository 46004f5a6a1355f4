"""Checkpoints that are whole and do not fit each other: said by name, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from running import checkpoint, cli, leftovers, linear, recipe_file, small_llama, two_llamas


def fails_to_plan(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tmp_path: Path, **more: Any) -> str:
    models = checkpoint(tmp_path / "one", one), checkpoint(tmp_path / "other", other)
    asked = recipe_file(linear(*models, **more), tmp_path / "r.yaml")
    planned, ran = cli("plan", asked), cli("merge", asked, "-o", tmp_path / "out")
    assert planned.status == ran.status == 2
    assert planned.err == ran.err
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == []
    return ran.err


def test_wrong_shapes_are_said_with_both(tmp_path: Path) -> None:
    other = small_llama(2)
    other["model.layers.1.mlp.up_proj.weight"] = torch.ones(8, 6)
    said = fails_to_plan(small_llama(1), other, tmp_path)
    assert "text.layers.{i}.mlp.up_proj.weight: 'other' is [8, 6], template 'one' is [9, 6]" in said


def test_a_packed_template_is_told_by_its_dtype_and_not_by_its_shapes(tmp_path: Path) -> None:
    packed = small_llama(1)
    packed["model.layers.1.mlp.up_proj.weight"] = torch.ones(27, 1, dtype=torch.uint8)
    said = fails_to_plan(packed, small_llama(2), tmp_path)
    assert said.startswith("polymerge: 1 problem")
    assert "'one' holds it as U8, which cannot be merged" in said


def test_a_tensor_that_one_has_and_the_other_not(tmp_path: Path) -> None:
    one, other = small_llama(1), small_llama(2)
    del other["model.layers.1.mlp.up_proj.weight"]
    other["model.layers.1.mlp.gate_proj.weight"] = torch.ones(9, 6)
    said = fails_to_plan(one, other, tmp_path)
    assert "text.layers.{i}.mlp.up_proj.weight: template 'one' has it, 'other' does not" in said
    assert "text.layers.{i}.mlp.gate_proj.weight: 'other' has it, template 'one' does not" in said


@pytest.mark.parametrize("which", ["one", "other"])
def test_a_name_that_no_rule_explains(which: str, tmp_path: Path) -> None:
    tensors = {"one": small_llama(1), "other": small_llama(2)}
    tensors[which]["model.mystery.weight"] = torch.ones(3)
    models = [checkpoint(tmp_path / label, own) for label, own in tensors.items()]
    ran = cli("merge", recipe_file(linear(*models), tmp_path / "r.yaml"), "-o", tmp_path / "out")
    assert ran.status == 1
    assert "model.mystery.weight" in ran.err
    assert f"'{which}' ({tmp_path / which})" in ran.err
    assert not (tmp_path / "out").exists()


def test_unknown_fields_and_globs_that_match_nothing(tmp_path: Path) -> None:
    more = {"exclude": ["text.lm_heads.*"], "modell": 1, "overrides": [{"layers": "0-9", "merge_method": "copy"}]}
    said = fails_to_plan(small_llama(1), small_llama(2), tmp_path, **more)
    assert "'text.lm_heads.*' matches no tensor" in said
    assert "unknown field 'modell'" in said
    assert "Did you mean 'models'" in said
    assert "layers 0-9, but template 'one' has layers 0-1" in said


def test_a_family_that_no_table_covers_is_not_joined_with_one_that_is_known(tmp_path: Path) -> None:
    strange = checkpoint(tmp_path / "strange", {"h.0.w": torch.ones(2)}, {"model_type": "gpt5"})
    one, _ = two_llamas(tmp_path)
    ran = cli("merge", recipe_file(linear(one, strange), tmp_path / "r.yaml"), "-o", tmp_path / "out")
    assert ran.status == 2
    assert "model_type 'gpt5'" in ran.err


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "dare_linear", "dare_ties"])
def test_methods_on_deltas_say_that_they_need_a_base(method: str, tmp_path: Path) -> None:
    said = fails_to_plan(small_llama(1), small_llama(2), tmp_path, merge_method=method)
    assert f"{method} works on deltas and needs base_model" in said


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "one", small_llama(1))
    packed = small_llama(2) | {"model.layers.0.mlp.up_proj.weight": torch.ones(9, 6, dtype=torch.int8)}
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    other = checkpoint(tmp_path / "other", packed, config)
    ran = cli("plan", recipe_file(linear(one, other), tmp_path / "r.yaml"))
    assert ran.status == 2
    assert f"'other' ({other}) is quantized (gptq)" in ran.err
