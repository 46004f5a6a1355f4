"""Norms of deltas at merge time: a base that no model was trained from is told, and a model that is the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import polymerge
from polymerge.engine.ancestry import FAR, DeltaNorm, ancestry_warnings
from running import checkpoint, cli, recipe_file, small_llama

Tensors = dict[str, Tensor]


def tuned(base: Tensors, size: float, only: str = "") -> Tensors:
    """The base with noise of a size relative to each tensor, or to those of one name alone."""
    generator = torch.Generator().manual_seed(9)
    return {
        name: tensor + size * tensor.std() * torch.randn(tensor.shape, generator=generator) if only in name else tensor
        for name, tensor in base.items()
    }


def recipe(folder: Path, base: Tensors, models: dict[str, Tensors], **more: Any) -> dict[str, Any]:
    made = [str(checkpoint(folder / name, tensors)) for name, tensors in models.items()]
    asked = {"merge_method": "task_arithmetic", "base_model": str(checkpoint(folder / "base", base)), "models": made}
    return asked | {"parameters": {"weight": 0.5}} | more


def literal(model: Tensors, base: Tensors) -> float:
    """Norm of the delta over that of the base, of all matrices."""
    pairs = [(model[name].double().numpy(), base[name].double().numpy()) for name in base if base[name].ndim == 2]
    delta = np.sqrt(sum(((one - other) ** 2).sum() for one, other in pairs))
    return float(delta / np.sqrt(sum((other**2).sum() for _, other in pairs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_norms_of_deltas_are_reported_and_far_ones_said(dtype: torch.dtype, tmp_path: Path) -> None:
    base = small_llama(0, dtype)
    models = {"near": tuned(base, 0.1), "far": small_llama(5, dtype)}
    asked = recipe(tmp_path, base, models)
    made = polymerge.merge(asked, tmp_path / "out", check=False)
    for name, model in models.items():
        assert made.deltas[name].ratio == pytest.approx(literal(model, base), rel=1e-3)
    far = made.deltas["far"].ratio
    assert 1 < far < 2
    assert made.warnings == (
        "base_model 'base' does not look like the common ancestor: models differ from it by so many times its norm: "
        f"'far' by {far:.2f}. Fine-tuning changes a small part, and models that share nothing differ by 1 or more. "
        "Name the checkpoint that they were trained from",
    )
    record = json.loads((tmp_path / "out/polymerge.json").read_text(encoding="utf-8"))["output"]
    assert record["delta_norms"] == {name: norm.ratio for name, norm in made.deltas.items()}
    assert record["warnings"] == list(made.warnings)
    ran = cli("merge", recipe_file(asked, tmp_path / "r.yaml"), "-o", tmp_path / "again", "--no-verify", "--threads", 1)
    assert f"note: {made.warnings[0]}\n" in ran.err
    again = json.loads((tmp_path / "again/polymerge.json").read_text(encoding="utf-8"))["output"]
    assert again["delta_norms"] == record["delta_norms"]


def test_a_model_that_is_the_base_is_said(tmp_path: Path) -> None:
    base = small_llama(0)
    # one matrix, or one vector, that was trained is enough
    models = {"same": base, "mlp": tuned(base, 0.1, "layers.1"), "norm": tuned(base, 0.1, "norm")}
    made = polymerge.merge(recipe(tmp_path, base, models), tmp_path / "out", check=False)
    assert made.warnings == (
        "'same' is equal to base_model 'base' in all 5 tensors of a sample: such a delta adds nothing to the merge",
    )
    assert made.deltas["norm"] == DeltaNorm(0.0, False, 5)


def test_tensors_longer_than_the_sample_are_looked_at_in_their_midst(tmp_path: Path) -> None:
    base = {"model.layers.0.mlp.up_proj.weight": torch.zeros(100, 128)}
    model = {name: tensor.clone() for name, tensor in base.items()}
    base["model.layers.0.mlp.up_proj.weight"][32:96] = 2.0  # elements 4096 to 12288 of 12800
    model["model.layers.0.mlp.up_proj.weight"][32:96] = 2.5
    made = polymerge.merge(recipe(tmp_path, base, {"model": model}), tmp_path / "out", check=False)
    assert made.deltas == {"model": DeltaNorm(0.25, False, 1)}
    assert made.warnings == ()


def test_what_works_on_weights_has_no_deltas(tmp_path: Path) -> None:
    asked = recipe(tmp_path, small_llama(0), {"one": small_llama(1), "two": small_llama(2)}, merge_method="linear")
    del asked["base_model"]
    made = polymerge.merge(asked, tmp_path / "out", check=False)
    assert (made.deltas, made.warnings) == ({}, ())
    assert "delta_norms" not in json.loads((tmp_path / "out/polymerge.json").read_text(encoding="utf-8"))["output"]


def test_the_threshold_lies_below_what_orthogonal_models_make() -> None:
    norms = {"a": DeltaNorm(FAR, False, 3), "b": DeltaNorm(0.49, False, 3), "c": DeltaNorm(float("inf"), False, 3)}
    (said,) = ancestry_warnings(norms, "base")
    assert "'a' by 0.50, 'c' by inf." in said
    assert "'b'" not in said
