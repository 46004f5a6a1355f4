"""Whole merges of tiny checkpoints, and the same once more by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from polymerge.families.expressions import expr_from_json, names_read
from running import raw
from tiny import family_in, open_model

IN_MEMORY = {"idefics2": "model.text_model.", "idefics3": "model.text_model."}
"""What transformers calls a family's decoder in memory, if not `model.language_model.`"""


def average(one: Tensor, other: Tensor) -> Tensor:
    """0.7 of one and 0.3 of the other in float32, rounded once to the dtype of one."""
    return (0.7 * one.float() + 0.3 * other.float()).to(one.dtype)


def literal_merge(vlm: Path, llm: Path, folder: Path) -> Path:
    """The same merge with both models in memory, by the names that they have there."""
    family = family_in(vlm)
    model, source = open_model(vlm), AutoModelForCausalLM.from_pretrained(llm)
    state = model.state_dict()
    prefix = IN_MEMORY.get(family, "model.language_model.")
    for name, tensor in source.named_parameters():  # each once, also where head and embedding are one
        own = name if name == "lm_head.weight" else prefix + name.removeprefix("model.")
        if family == "mllama":  # its layers 1 and 3 look at the image
            own = own.replace("layers.1.", "layers.2.")
        if state[own].shape == tensor.shape:
            state[own].copy_(average(state[own], tensor))
    model.save_pretrained(folder)
    for companion in vlm.iterdir():
        if not (folder / companion.name).exists() and companion.suffix != ".safetensors":
            (folder / companion.name).write_bytes(companion.read_bytes())
    return folder


def in_memory(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = open_model(folder).state_dict()
    return state


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def recipe(vlm: Path, llm: Path, **more: Any) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [
            {"model": str(vlm), "parameters": {"weight": 0.7}},
            {"model": str(llm), "parameters": {"weight": 0.3}, **more},
        ],
    }


def check_fates(made: Mapping[str, Any], inputs: Mapping[int, Path], out: Path) -> None:
    """Every tensor of every input has one fate, the output is what the plan says, and copies are byte-identical."""
    before, after = raw(inputs[made["template"]]), raw(out)
    fates = {step["name"]: step["fate"] for step in made["steps"]}
    assert fates.keys() == before.keys() == after.keys()
    for place, folder in inputs.items():
        left_out = {entry["name"]: entry["reason"] for entry in made["left_out"] if entry["input"] == place}
        assert all(left_out.values())
        pieces = [piece for step in made["steps"] for piece in step["pieces"]]
        read = {name for piece in pieces for name in names_in(piece["reads"], made, place)}
        read |= set(fates) if place == made["template"] else set()
        assert not read & set(left_out)
        assert read | set(left_out) == set(raw(folder))
    for name, fate in fates.items():
        assert (before[name] == after[name]) == (fate == "copied"), name


def names_in(reads: list[Any], made: Mapping[str, Any], place: int) -> set[str]:
    exprs = [expr for model, expr in zip(made["models"], reads, strict=True) if model == place]
    return {name for expr in exprs for name in names_read(expr_from_json(expr))}
