"""Shards of a repository on the stand-in for the hub."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from running import small_llama

NAMES = list(small_llama(0))


def sharded(folder: Path, seed: int, rows: int = 7) -> Path:
    """A small Llama, each tensor of which is in a file of its own."""
    folder.mkdir()
    tensors, files = small_llama(seed, rows=rows), {}
    for number, (name, tensor) in enumerate(tensors.items(), 1):
        files[name] = f"model-{number:05}-of-{len(tensors):05}.safetensors"
        save_file({name: tensor.contiguous()}, folder / files[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {f"t{row}": row for row in range(rows)}}}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "code.py").write_text("CODE = 1\n")
    (folder / "README.md").write_text("a card")
    return folder


def shard(name: str) -> str:
    return f"model-{NAMES.index(name) + 1:05}-of-{len(NAMES):05}.safetensors"
