"""Tensors whose numbers or shapes are odd, through each method: merges of a few small ones."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import torch

from fuzz_judge import Files, Kind
from polymerge.engine.merge import merge
from polymerge.methods.table import METHODS

__all__ = ["KINDS"]

_NAMES = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight",
          "model.layers.0.input_layernorm.weight", "model.norm.weight", "lm_head.weight")  # fmt: skip
_SHAPES = (
    (),
    (0,),
    (1,),
    (2,),
    (7,),
    (0, 4),
    (4, 0),
    (1, 1),
    (3, 5),
    (2, 0, 3),
    (1, 2, 3),
    (4, 4),
    (2**40, 0),
    (1,) * 8,
)
_DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float16, torch.float64, torch.int64,
           torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64)  # fmt: skip
_VALUES = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-45,
    1e-40,
    6e-8,
    3e38,
    -3e38,
    65504.0,
    1e-8,
    float("nan"),
    float("inf"),
    float("-inf"),
)


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, random: Random, plain: bool) -> torch.Tensor:
    count = 1
    for size in shape:
        count *= size
    odd = _VALUES[: 14 if random.random() < 0.1 else 11]  # the last of which are refused
    numbers = [random.uniform(-1, 1) if plain or random.random() < 0.5 else random.choice(odd) for _ in range(count)]
    if not dtype.is_floating_point and not dtype.is_complex:
        numbers = [float(random.randrange(3)) for _ in numbers]
    return torch.tensor(numbers, dtype=torch.float64).to(dtype).reshape(shape)


def _make(random: Random) -> Files:
    row = random.choice([one for one in METHODS.values() if one.entrywise])
    names = random.sample(_NAMES, random.choice((1, 2, 3)))
    shapes = {name: random.choice(_SHAPES) for name in names}
    dtypes = {name: random.choice(_DTYPES[:7] if random.random() < 0.9 else _DTYPES) for name in names}
    plain = random.random() < 0.4
    files: dict[str, bytes] = {}
    roles = ["base", "one", "two", "three"][: 1 + (row.models or random.choice((1, 2, 3)))]
    alike = random.random() < 0.15
    first: dict[str, torch.Tensor] = {}
    for role in roles:
        own = {}
        for name in names:
            shape = shapes[name] if random.random() < 0.97 else random.choice(_SHAPES)
            dtype = dtypes[name] if random.random() < 0.9 else random.choice(_DTYPES)
            own[name] = first[name] if alike and name in first else _tensor(shape, dtype, random, plain)
        first = first or own
        files[f"{role}/model.safetensors"] = safetensors.torch.save(
            {name: held.clone() for name, held in own.items()}, {"format": "pt"}
        )
        files[f"{role}/config.json"] = json.dumps({"model_type": random.choice(("llama", "llama", "unknown"))}).encode()

    def value(parameter: Any) -> Any:
        match parameter.kind:
            case "number":
                low, high = max(parameter.low, -1e9), min(parameter.high, 1e9)
                return min(max(random.choice((0, 1, 0.5, -1, 1e-9, 1e9, 0.3, 3)), low), high)
            case "flag":
                return random.random() < 0.5
        return random.choice(parameter.choices) if parameter.choices else 1

    recipe: dict[str, Any] = {
        "merge_method": row.name,
        "models": [f"@HERE/{role}" for role in roles[1:]],
        "parameters": {one.name: value(one) for one in row.parameters if one.default is None or random.random() < 0.6},
    }
    if row.on == "deltas":
        recipe["base_model"] = "@HERE/base"
    if random.random() < 0.3:
        recipe["dtype"] = random.choice(("float32", "float16", "bfloat16"))
    return {**files, "recipe.json": json.dumps(recipe).encode()}


def _read(folder: Path) -> object:
    recipe = json.loads((folder / "recipe.json").read_text().replace("@HERE", str(folder)))
    return merge(recipe, folder / "out", check=False, threads=1, block=64)


KINDS = (Kind("values", _make, _read, 15),)
