"""Checkpoints in fp8 made of random codes, and the numbers that they stand for, multiplied out literally by torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
CODES = {
    "F8_E4M3": [code for code in range(256) if code & 0x7F != 0x7F],
    "F8_E5M2": [code for code in range(256) if code & 0x7C != 0x7C],
}
"""All codes of numbers; the others are NaN and infinity."""

BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def _group(**weights: Any) -> dict[str, Any]:
    scheme = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "symmetric": True, **weights}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": scheme}}


@dataclass(frozen=True)
class Kind:
    """A kind of scales: the end of their names, rows and columns of the block that each is for, and what configs say.

    block  0 stands for all of a dimension; no block at all for one scale without dimensions
    apart  whether the numbers of blocks of rows and of columns have a 1 after each
    bytes  whether scales are exponents of 2 in bytes
    """

    end: str
    block: tuple[int, int] | None
    said: Mapping[str, Any] = field(default_factory=dict)
    flat: bool = False
    apart: bool = False
    bytes: bool = False

    def shape(self, weight: Sequence[int]) -> tuple[int, ...]:
        """The shape of the scales of a weight of this shape."""
        if self.block is None:
            return (1,) if self.flat else ()
        counts = [-(-size // (step or size)) for size, step in zip(weight[-2:], self.block, strict=True)]
        return tuple(counts[:1] if self.flat else [*weight[:-2], *counts])


KINDS: Mapping[str, Kind] = {
    "blocks of 128": Kind("weight_scale_inv", (128, 128), BLOCKS),
    "blocks of 24 x 20": Kind("weight_scale_inv", (24, 20), BLOCKS | {"weight_block_size": [24, 20]}),
    "static, a tensor": Kind("weight_scale_inv", None, BLOCKS | {"weight_block_size": None}),
    "compressed-tensors, a tensor": Kind("weight_scale", None, _group(strategy="tensor"), flat=True),
    "compressed-tensors, channels": Kind("weight_scale", (1, 0), _group(strategy="channel")),
    "compressed-tensors, blocks": Kind("weight_scale", (16, 32), _group(strategy="block", block_structure=[16, 32])),
    "compressed-tensors, groups": Kind("weight_scale", (1, 16), _group(strategy="group", group_size=16)),
    "fbgemm": Kind("weight_scale", (1, 0), {"quant_method": "fbgemm_fp8"}),
    "modelopt, rows": Kind("weight_scale", (1, 0), {"quant_method": "modelopt"}, flat=True),
    "modelopt, blocks": Kind("weight_scale", (128, 128), {"quant_method": "modelopt"}, apart=True),
    "modelopt, MXFP8": Kind("weight_scale", (1, 32), {"quant_method": "modelopt", "quant_algo": "MXFP8"}, bytes=True),
    "mistral": Kind("qscale_weight", None),
    "DeepSeek": Kind("scale", (128, 128)),
}


def literal(codes: Tensor, scales: Tensor, block: tuple[int, int] | None) -> Tensor:
    """The numbers of a weight in fp8, as `Kind.block` has its scales: each product in float32."""
    spread = scales.to(torch.float32)
    if block is None:
        return codes.to(torch.float32) * spread.reshape(())
    spread = spread.reshape(*codes.shape[:-2], -1, spread.shape[-1] if spread.ndim > 1 else 1)
    for place in (-2, -1):
        size = codes.shape[place]
        spread = spread.repeat_interleave(block[place] or size, place).narrow(place, 0, size)
    return codes.to(torch.float32) * spread


def codes(shape: tuple[int, ...], dtype: str, generator: torch.Generator) -> Tensor:
    """Random codes, among which all are as far as there is room."""
    known = torch.tensor(CODES[dtype], dtype=torch.uint8)
    drawn = known[torch.randint(len(known), shape, generator=generator)]
    drawn.view(-1)[: len(known)] = known[: drawn.numel()]
    return drawn.view(FP8[dtype])


def quantized(
    folder: Path, kind: str, *, dtype: str = "F8_E4M3", scale: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Replace the weights of linear layers by random ones in fp8, in place; every tensor of the model as numbers."""
    made = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)
    numbers = {}
    for file in sorted(folder.glob("*.safetensors")):
        held = load_file(file)
        for name, tensor in sorted(held.items()):
            numbers[name] = tensor
            if tensor.ndim > 1 and "_proj" in name and not any(part in name for part in ("vision", "multi_modal")):
                held[name] = codes(tuple(tensor.shape), dtype, generator)
                drawn = torch.rand(made.shape(tensor.shape), generator=generator) * 1e-3 + 1e-5
                if made.bytes:
                    drawn = (drawn.log2().round() + 127).to(torch.uint8)
                whole = name if name.endswith(".weight") else f"{name}_weight"  # that of experts in one tensor
                drawn = drawn if made.bytes else drawn.to(scale)
                lying = drawn[:, None, :, None] if made.apart else drawn
                held[(whole.removesuffix("weight") + made.end).replace("_weight_", "_")] = lying
                numbers[name] = literal(held[name], 2 ** (drawn.float() - 127) if made.bytes else drawn, made.block)
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    said = {"quantization_config": dict(made.said)} if made.said else {}
    (folder / "config.json").write_text(json.dumps(config | said), encoding="utf-8")
    return numbers
