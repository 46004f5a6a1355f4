"""Adapters on another model than the one that they were trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CLOSE = {"rtol": 1e-6, "atol": 1e-6}


PREFIX = "base_model.model."


RANK, ALPHA = 3, 4


def factors(modules: dict[str, tuple[int, int]], seed: int = 5) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random factors for modules of these shapes, [out, in], and the update of each in float64."""
    generator = torch.Generator().manual_seed(seed)
    tensors, updates = {}, {}
    for module, (out, width) in modules.items():
        a, b = (torch.randn(shape, generator=generator) for shape in ((RANK, width), (out, RANK)))
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        updates[module] = b.double() @ a.double() * ALPHA / RANK
    return tensors, updates


def adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file({PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def raw_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
