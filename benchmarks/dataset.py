"""Checkpoints to merge: a base and two fine-tunes in the shape of Llama-3.2-1B, made of random numbers.

The numbers are of the size that trained weights and their changes have. What a merge costs depends on the bytes, on how
many values are equal in magnitude and on how many entries a fine-tune has left alone: `a` changes nearly all of them a
little, `b` three in ten of them more. The same numbers come out on every machine with the same numpy.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

__all__ = ["MODELS", "SHAPES", "Shape", "make_models", "open_tensor"]

MODELS = ("base", "a", "b")
SHARDS = 3
BLOCK = 1 << 20
RECIPE = 1  # of the numbers; another one makes existing folders stale

Bits = NDArray[np.uint16]
Table = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's kind with tied embeddings."""

    layers: int
    vocabulary: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int

    def tensors(self) -> Table:
        """Every tensor's name and shape, in the order of the file."""
        hidden, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        layer = {
            "input_layernorm": (hidden,),
            "mlp.down_proj": (hidden, self.intermediate),
            "mlp.gate_proj": (self.intermediate, hidden),
            "mlp.up_proj": (self.intermediate, hidden),
            "post_attention_layernorm": (hidden,),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.v_proj": (kv, hidden),
        }
        layers = {f"model.layers.{n}.{name}.weight": shape for n in range(self.layers) for name, shape in layer.items()}
        return {"model.embed_tokens.weight": (self.vocabulary, hidden), **layers, "model.norm.weight": (hidden,)}

    def parameters(self) -> int:
        """How many numbers one model has."""
        return sum(prod(shape) for shape in self.tensors().values())

    def config(self) -> dict[str, object]:
        """The model's config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        }


SHAPES = {
    "1.2B": Shape(layers=16, vocabulary=128256, hidden=2048, intermediate=8192, heads=32, kv_heads=8),
    "0.1B": Shape(layers=4, vocabulary=32000, hidden=1024, intermediate=4096, heads=16, kv_heads=4),
}


def make_models(size: str, data: Path, progress: Callable[[int], object] = lambda _: None) -> Path:
    """The folder with `base`, `a` and `b` of a size, made unless it is there already.

    progress   told how many parameters have been written, each counted once for all three models
    """
    shape, folder = SHAPES[size], data / size
    stamp = json.dumps({"recipe": RECIPE, "numpy": np.__version__.split(".")[0], **asdict(shape)})
    if (folder / "stamp.json").is_file() and (folder / "stamp.json").read_text(encoding="utf-8") == stamp:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    for model in MODELS:
        (folder / model).mkdir(parents=True)
        (folder / model / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n", encoding="utf-8")
    tensors = shape.tensors()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(_thirds(tensors)):
        file = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        _write_shard([folder / model / file for model in MODELS], {name: tensors[name] for name in names}, progress)
    index = {"metadata": {"total_size": 2 * shape.parameters()}, "weight_map": weight_map}
    for model in MODELS:
        (folder / model / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    (folder / "stamp.json").write_text(stamp, encoding="utf-8")
    return folder


def open_tensor(folder: Path, name: str) -> Bits | NDArray[np.float32]:
    """A BF16 or F32 tensor of a checkpoint's folder, flat, mapped and not read; BF16 as bits."""
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        if name in header:
            start, stop = header[name]["data_offsets"]
            kind = np.dtype({"BF16": np.uint16, "F32": np.float32}[header[name]["dtype"]])
            return np.memmap(file, kind, "r", offset=8 + size + start, shape=((stop - start) // kind.itemsize,))
    raise KeyError(f"{folder}: holds no tensor {name}")


def _thirds(tensors: Table) -> Iterator[list[str]]:
    """The names, in order, in as many groups as there are shards, of about the same size."""
    total = sum(prod(shape) for shape in tensors.values())
    groups: list[list[str]] = [[] for _ in range(SHARDS)]
    done = 0
    for name, shape in tensors.items():
        groups[min(SHARDS * done // total, SHARDS - 1)].append(name)
        done += prod(shape)
    yield from groups


def _write_shard(files: list[Path], tensors: Table, progress: Callable[[int], object]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        size = 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    streams: list[BinaryIO] = []
    try:
        for file in files:
            streams.append(file.open("wb"))
            streams[-1].write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors.items():
            random = np.random.default_rng(np.frombuffer(name.encode(), np.uint8))
            for start in range(0, prod(shape), BLOCK):
                count = min(BLOCK, prod(shape) - start)
                for stream, bits in zip(streams, _block(random, count), strict=True):
                    stream.write(bits.data)
                progress(count)
    finally:
        for stream in streams:
            stream.close()


def _block(random: np.random.Generator, count: int) -> tuple[Bits, Bits, Bits]:
    """The next numbers of base, a and b."""
    base = _bf16(random.standard_normal(count, np.float32) * np.float32(0.02))
    wide = (base.astype(np.uint32) << 16).view(np.float32)
    a = wide + random.standard_normal(count, np.float32) * np.float32(2e-4)
    changed = random.random(count, np.float32) < 0.3
    b = wide + np.where(changed, random.standard_normal(count, np.float32) * np.float32(5e-4), np.float32(0))
    return base, _bf16(a), _bf16(b)


def _bf16(values: NDArray[np.float32]) -> Bits:
    """The upper halves of the numbers' bits, rounded to the nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
