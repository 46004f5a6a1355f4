"""Turn safetensors files into `pytorch_model*.bin`, for loaders that know nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

__all__ = ["as_torch_file", "as_torch_files"]


def as_torch_file(file: Path, target: Path) -> None:
    """Replace one safetensors file by a torch file with the same tensors."""
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(file), target)
    file.unlink()


def as_torch_files(folder: Path, tied: Mapping[str, str]) -> None:
    """Replace the safetensors files of a folder by torch files with the same tensors, one shard at a time.

    tied   names to add that share the storage of another tensor, each with that tensor's name

    The tensors of a shard are views of the mapped file while torch writes them, so memory does not grow with them.
    """
    import torch
    from safetensors import safe_open

    shards = sorted(folder.glob("model*.safetensors"))
    weight_map: dict[str, str] = {}
    size = 0
    for shard in shards:
        name = shard.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
        with safe_open(shard, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            size += sum(tensor.nbytes for tensor in tensors.values())
            tensors |= {alias: tensors[same] for alias, same in tied.items() if same in tensors}
            torch.save(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
        del tensors
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
