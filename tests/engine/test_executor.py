"""Tensors without dimensions or without elements go through every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from running import checkpoint, merged
from tiny import load


@pytest.mark.parametrize(
    ("method", "parameters", "wanted"),
    [
        ("linear", {"weight": 1}, 2.0),
        ("slerp", {"t": 0.25}, 1.75),
        ("task_arithmetic", {"weight": 1}, 2.5),
        ("ties", {"weight": 1, "density": 1}, 2.5),
        ("ties", {"weight": 1, "density": 0.5}, 2.5),  # one entry is kept at least
        ("ties", {"weight": 1, "density": 0}, 1.5),
        ("ties", {"weight": 1, "density": 1, "trim": "model"}, 2.5),
        ("dare_ties", {"weight": 1, "density": 0}, 1.5),
    ],
)
def test_tensors_without_dimensions_or_elements(
    method: str, parameters: dict[str, Any], wanted: float, tmp_path: Path
) -> None:
    models = []
    for label, value in (("one", 1.5), ("other", 2.5)):
        own = {"factor": torch.tensor(value), "none": torch.empty(0, 4), "wide": torch.ones(3, 0)}
        named = {f"model.layers.0.{name}": tensor for name, tensor in own.items()}
        models.append(str(checkpoint(tmp_path / label, named)))
    asked = {"merge_method": method, "models": models, "parameters": parameters, "base_model": models[0]}
    if method not in ("linear", "slerp"):
        asked["models"] = [{"model": models[1]}]
    out = load(merged(asked, tmp_path / "out", "--no-verify"))
    like = load(tmp_path / "one")
    assert {name: tensor.shape for name, tensor in out.items()} == {name: like[name].shape for name in like}
    assert out["model.layers.0.factor"] == wanted
