"""The ways in which the experts of one checkpoint lie on disk: one by one, or all of a layer in one tensor.

in_one(folder)                    # as transformers 5 has them in memory: [expert, out, in]
in_one(folder, transposed=True)   # as Qwen3-VL was published: [expert, in, out]
one_by_one(folder)                # a tensor for each matrix of each expert, as Qwen3 was published
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]

HIDDEN = 32
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def in_one(folder: Path, *, transposed: bool = False) -> Path:
    """Put all experts of a layer into one tensor, in place."""
    return _rewritten(folder, lambda tensors: fused(apart(tensors), transposed=transposed))


def one_by_one(folder: Path) -> Path:
    """Give every matrix of every expert a tensor, in place."""
    return _rewritten(folder, apart)


def apart(tensors: Tensors) -> Tensors:
    """Tensors of a checkpoint in any of the ways, its experts one by one; other tensors are left as they are."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".experts.")
        if kind in PARTS:
            for expert, matrix in enumerate(tensor):
                plain = matrix if matrix.shape[kind == "gate_up_proj"] == HIDDEN else matrix.T
                for part, block in zip(PARTS[kind], plain.chunk(len(PARTS[kind])), strict=True):
                    found[f"{layer}.experts.{expert}.{part}.weight"] = block.contiguous()
        elif "block_sparse_moe." in name:
            own = re.sub(r"(?<=\.)w[123](?=\.)", lambda match: MIXTRAL[match[0]], name)
            found[own.replace("block_sparse_moe.", "mlp.")] = tensor
        else:
            found[name] = tensor
    return found


def fused(tensors: Tensors, *, transposed: bool = False) -> Tensors:
    """Tensors whose experts are one by one, with all experts of a layer in one."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in sorted({name.partition(".experts.")[0] for name in tensors.keys() - found.keys()}):
        matrices = []
        for expert in range(sum(name.startswith(f"{layer}.experts.") for name in tensors) // 3):
            own = [tensors[f"{layer}.experts.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down")]
            matrices.append((torch.cat(own[:2]), own[2]))
        for place, name in enumerate(PARTS):
            stacked = torch.stack([pair[place] for pair in matrices])
            found[f"{layer}.experts.{name}"] = (stacked.mT if transposed else stacked).contiguous()
    return found


def _rewritten(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    shards = sorted(folder.glob("*.safetensors"))
    changed = change({name: tensor for shard in shards for name, tensor in load_file(shard).items()})
    for file in (*shards, *folder.glob("*.index.json")):
        file.unlink()
    save_file(dict(sorted(changed.items())), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
