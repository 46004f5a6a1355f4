"""Checkpoints that are headers and nothing else: real sizes, and files full of holes that take no room on the disk.

template = vlm(tmp_path / "vlm")
model = llm(tmp_path / "llm", vocab=20, without=["lm_head.weight"])
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from polymerge.dtypes import BITS

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]

BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"
"""What old checkpoints of language models store and nobody merges."""

PARTS = {"model.": "text.", "lm_head.": "text.lm_head.", "language_model.model.": "text.",
         "language_model.lm_head.": "text.lm_head.", "vision_tower.vision_model.": "vision.",
         "multi_modal_projector.": "projector.", "image_newline": "projector.image_newline"}  # fmt: skip


def canonical(name: str) -> str:
    """The canonical name of a tensor of `vlm` or `llm`."""
    (prefix,) = (prefix for prefix in PARTS if name.startswith(prefix))
    return PARTS[prefix] + name.removeprefix(prefix)


def is_buffer(name: str) -> bool:
    """Whether a tensor of `vlm` or `llm` is one that is never merged."""
    return name == BUFFER or name.endswith(".position_ids")


def checkpoint(folder: Path, config: Mapping[str, Any] | None, tensors: Shapes, shards: int = 1) -> Path:
    """Write a checkpoint whose every byte is a zero that is not there."""
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        header, end = {}, 0
        for name in names[shard::shards]:
            dtype, shape = tensors[name]
            start, end = end, end + prod(shape) * BITS[dtype] // 8
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)
    if shards > 1:
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return folder


def decoder(layers: int, width: int, inner: int, keys: int, vocab: int, dtype: str) -> dict[str, Any]:
    """The tensors of a Llama, without its head."""
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (vocab, width)}
    for layer in range(layers):
        own = f"layers.{layer}."
        shapes |= {own + f"self_attn.{name}_proj.weight": (rows, width) for name, rows in (("q", width), ("k", keys))}
        shapes |= {own + "self_attn.v_proj.weight": (keys, width), own + "self_attn.o_proj.weight": (width, width)}
        shapes |= {own + f"mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes |= {own + "mlp.down_proj.weight": (width, inner), own + "input_layernorm.weight": (width,)}
        shapes[own + "post_attention_layernorm.weight"] = (width,)
    shapes["norm.weight"] = (width,)
    return {name: (dtype, shape) for name, shape in shapes.items()}


def llm(
    folder: Path,
    *,
    layers: int = 2,
    width: int = 8,
    inner: int = 12,
    keys: int = 4,
    vocab: int = 16,
    tie: bool | None = False,
    head: bool = True,
    kind: str = "llama",
    dtype: str = "BF16",
    without: Iterable[str] = (),
    more: Shapes | None = None,
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
) -> Path:
    """A language model; `tie` says in its config whether the head is the embedding, `head` whether one is stored."""
    tensors = {f"model.{name}": shape for name, shape in decoder(layers, width, inner, keys, vocab, dtype).items()}
    tensors[BUFFER] = ("F32", (width // 2,))
    if head:
        tensors["lm_head.weight"] = (dtype, (vocab, width))
    said = {"architectures": [f"{kind.capitalize()}ForCausalLM"], "model_type": kind, "num_hidden_layers": layers}
    if tie is not None:
        said["tie_word_embeddings"] = tie
    return checkpoint(folder, said | dict(config or {}), _changed(tensors, without, more), shards)


def vlm(
    folder: Path,
    *,
    layers: int = 2,
    width: int = 8,
    inner: int = 12,
    keys: int = 4,
    vocab: int = 16,
    tie: bool = False,
    head: bool = True,
    dtype: str = "BF16",
    seen: int = 6,
    without: Iterable[str] = (),
    more: Shapes | None = None,
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
) -> Path:
    """A LLaVA-NeXT: the language model above, an eye of one layer that is `seen` wide, and what joins them."""
    tensors: dict[str, Any] = {
        "image_newline": (dtype, (width,)),
        "multi_modal_projector.linear_1.bias": (dtype, (width,)),
        "multi_modal_projector.linear_1.weight": (dtype, (width, seen)),
        "vision_tower.vision_model.embeddings.position_ids": ("I64", (1, 5)),
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": (dtype, (seen, seen)),
        "vision_tower.vision_model.encoder.layers.0.layer_norm1.bias": (dtype, (seen,)),
    }
    text = decoder(layers, width, inner, keys, vocab, dtype)
    tensors |= {f"language_model.model.{name}": shape for name, shape in text.items()}
    if head:
        tensors["language_model.lm_head.weight"] = (dtype, (vocab, width))
    text_config = {"model_type": "llama", "num_hidden_layers": layers}
    said = {"model_type": "llava_next", "tie_word_embeddings": tie, "text_config": text_config}
    said["architectures"] = ["LlavaNextForConditionalGeneration"]
    return checkpoint(folder, said | dict(config or {}), _changed(tensors, without, more), shards)


def _changed(tensors: Mapping[str, Any], without: Iterable[str], more: Shapes | None) -> dict[str, Any]:
    missing = set(without)
    assert missing <= set(tensors)
    return {name: shape for name, shape in tensors.items() if name not in missing} | dict(more or {})
