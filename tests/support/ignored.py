"""Checkpoints with tensors that are not of a model, and recipes that ignore them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import polymerge
from polymerge.errors import Refused
from tiny import load

VALUE_HEAD = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.zeros(1)}


def with_more(folder: Path, more: dict[str, Tensor], out: Path, before: str = "", drop: tuple[str, ...] = ()) -> Path:
    """A copy of a checkpoint with more tensors in its file, all names after `before`, and without some."""
    shutil.copytree(folder, out)
    held = {name: tensor for name, tensor in load(folder).items() if name not in drop}
    tensors = {before + name: tensor.contiguous() for name, tensor in (held | more).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def recipe_of(one: Path, other: Any, **more: Any) -> dict[str, Any]:
    """0.7 of `one` and 0.3 of `other`, which may be an entry of `models`."""
    entry = other if isinstance(other, dict) else {"model": str(other)}
    models = [{"model": str(one), "parameters": {"weight": 0.7}}, {**entry, "parameters": {"weight": 0.3}}]
    return {"merge_method": "linear", "models": models, **more}


def check_merge(out: Path, one: Path, other: Path) -> None:
    """Every tensor of the output is 0.7 of `one` and 0.3 of `other`, and is one of `one`."""
    a, b, merge = load(one), load(other), load(out)
    assert set(merge) == set(a)
    for name, tensor in merge.items():
        assert torch.allclose(tensor, 0.7 * a[name] + 0.3 * b[name], rtol=0, atol=1e-6), name


def problems_of(recipe: dict[str, Any]) -> list[str]:
    with pytest.raises(Refused) as refused:
        polymerge.plan(recipe)
    return [str(problem) for problem in refused.value.problems]
