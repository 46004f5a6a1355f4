"""Merges of models far larger than this machine: their plans, their memory, and their schedule on a cluster.

    python benchmarks/scale.py                         # all three parts, about 12 GB of disk
    python benchmarks/scale.py --parts plan cluster
    python benchmarks/scale.py --layers 1 4 --json FILE

The models are files full of holes: headers of the right names and shapes, and as many bytes that are not there as they
speak of, which read as zeros. A plan reads nothing else. A merge of them computes and writes as any other, and what it
writes takes the disk in full; only reading costs less than from a disk. So the parts are:

plan     Llama 3.1 405B and two fine-tunes of it, planned for TIES with one threshold over the whole model
memory   a model in the shape of Llama 3.1 70B, merged with as many layers as there is room for, and with fewer
cluster  layers of Llama 3.1 8B and 32000 tokens, on eight Ray nodes of this machine with one processor each
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from measure import machine, measure, settle

SHARD = 4_700_000_000  # bytes of data, at most, of an input file: what the published ones have
NODES = 8


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama; `keys` is the width of its keys and values."""

    width: int
    inner: int
    keys: int
    layers: int
    vocab: int = 128256
    heads: int = 64

    def tensors(self) -> dict[str, tuple[int, ...]]:
        layer = {
            "self_attn.q_proj": (self.width, self.width), "self_attn.k_proj": (self.keys, self.width),
            "self_attn.v_proj": (self.keys, self.width), "self_attn.o_proj": (self.width, self.width),
            "mlp.gate_proj": (self.inner, self.width), "mlp.up_proj": (self.inner, self.width),
            "mlp.down_proj": (self.width, self.inner), "input_layernorm": (self.width,),
            "post_attention_layernorm": (self.width,),
        }  # fmt: skip
        return {
            "model.embed_tokens.weight": (self.vocab, self.width),
            **{f"model.layers.{i}.{name}.weight": shape for i in range(self.layers) for name, shape in layer.items()},
            "model.norm.weight": (self.width,),
            "lm_head.weight": (self.vocab, self.width),
        }

    @property
    def size(self) -> int:
        """Bytes in bfloat16."""
        return 2 * sum(map(prod, self.tensors().values()))

    def config(self) -> dict[str, Any]:
        return {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": self.width,
            "intermediate_size": self.inner, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": 8, "vocab_size": self.vocab, "tie_word_embeddings": False, "dtype": "bfloat16",
        }  # fmt: skip


SHAPES = {
    "405B": Shape(16384, 53248, 1024, 126, heads=128),
    "70B": Shape(8192, 28672, 1024, 80),
    "8B": Shape(4096, 14336, 1024, 32, heads=32),
}


def full_of_holes(folder: Path, shape: Shape) -> Path:
    """A checkpoint of this shape whose files hold their headers and nothing else."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.config()), encoding="utf-8")
    files: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, of in shape.tensors().items():
        size = 2 * prod(of)
        if files[-1] and filled + size > SHARD:
            files.append({})
            filled = 0
        files[-1][name] = of
        filled += size
    weight_map = {}
    for number, tensors in enumerate(files, 1):
        file, header, end = f"model-{number:05}-of-{len(files):05}.safetensors", {}, 0
        for name, of in tensors.items():
            start, end = end, end + 2 * prod(of)
            header[name] = {"dtype": "BF16", "shape": of, "data_offsets": [start, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)
    index = {"metadata": {"total_size": shape.size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def family(folder: Path, shape: Shape) -> dict[str, Any]:
    """A base and two fine-tunes, and what a recipe says of them."""
    base, *tuned = (full_of_holes(folder / name, shape) for name in ("base", "a", "b"))
    return {"base_model": str(base), "models": [{"model": str(one)} for one in tuned]}


def recipe(models: dict[str, Any], method: str) -> dict[str, Any]:
    said = {
        "linear": {"merge_method": "linear", "parameters": {"weight": 0.5}},
        "ties": {"merge_method": "ties", "parameters": {"weight": 1.0, "density": 0.2, "trim": "model"}},
    }[method]
    return {**({"models": models["models"]} if method == "linear" else models), **said}


def program(*words: object) -> list[str]:
    return [sys.executable, "-c", "from polymerge.cli import main; main()", *map(str, words)]


def written(folder: Path, what: dict[str, Any]) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(what), encoding="utf-8")  # JSON is YAML
    return file


def plan(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """The time of `polymerge plan`, its start included."""
    shape = SHAPES["405B"]
    models = family(folder, shape)
    file = written(folder, recipe(models, "ties"))
    files = list(folder.glob("*/*.safetensors"))
    took = [measure(program("plan", file)) for _ in range(rounds)]
    return [
        {
            "model": "405B", "models": 3, "files": len(files), "bytes": 3 * shape.size,
            "on disk": sum(512 * one.stat().st_blocks for one in files),
            "seconds": [round(one.seconds, 2) for one in took], "anonymous MiB": [one.anonymous >> 20 for one in took],
        }
    ]  # fmt: skip


def memory(folder: Path, layers: Sequence[int], vocab: int) -> list[dict[str, Any]]:
    """Merges of the first layers of a 70B, and what they would come to with all of them."""
    whole, rows = SHAPES["70B"], []
    for count in layers:
        shape = replace(whole, layers=count, vocab=vocab)
        models = family(folder / f"{count}", shape)
        for method in ("linear", "ties"):
            out, file = folder / "out", written(folder, recipe(models, method))
            shutil.rmtree(out, ignore_errors=True)
            settle(patience=10)
            took = measure(program("merge", file, "-o", out, "--no-verify"))
            rate = shape.size / took.seconds
            rows.append(
                {
                    "layers": count, "method": method, "output": shape.size, "seconds": round(took.seconds, 1),
                    "MB/s": round(rate / 1e6), "anonymous MiB": took.anonymous >> 20,
                    "of 80 layers, minutes": round(whole.size / rate / 60, 1),
                }
            )  # fmt: skip
            shutil.rmtree(out)
    return rows


def cluster(folder: Path, layers: int, shard: str) -> list[dict[str, Any]]:
    """A merge on eight nodes: what each read and wrote, and how long it had nothing to do."""
    import ray
    from ray.cluster_utils import Cluster

    import polymerge

    models = family(folder, replace(SHAPES["8B"], layers=layers, vocab=32000))
    node = {"num_cpus": 1, "object_store_memory": 80 << 20}
    nodes = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    for _ in range(NODES - 1):
        nodes.add_node(wait=False, **node)
    nodes.wait_for_nodes()
    rows = []
    try:
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        for method in ("linear", "ties"):
            out = folder / f"out-{method}"
            began = time.time()
            made = polymerge.merge(
                recipe(models, method), out, ray=nodes.address, shard_size=shard, threads=1, check=False
            )
            seconds = time.time() - began
            rows.append({"method": method, "seconds": round(seconds, 1), **schedule(made.worked)})
            shutil.rmtree(out)
    finally:
        ray.shutdown()
        nodes.shutdown()
    return rows


def schedule(worked: Sequence[Any]) -> dict[str, Any]:
    """What the nodes did between the first start and the last end of a task."""
    busy, read, wrote = defaultdict[str, float](float), defaultdict[str, int](int), defaultdict[str, int](int)
    for task in worked:
        busy[task.machine] += task.ended - task.began
        read[task.machine] += task.read
        wrote[task.machine] += task.written
    wall = max(task.ended for task in worked) - min(task.began for task in worked)
    return {
        "nodes": len(busy), "tasks": len(worked), "wall": round(wall, 1),
        "idle share": round(1 - sum(busy.values()) / (NODES * wall), 3),
        "busy seconds": sorted(round(one, 1) for one in busy.values()),
        "read MB": sorted(round(one / 1e6) for one in read.values()),
        "written MB": sorted(round(one / 1e6) for one in wrote.values()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=("plan", "memory", "cluster"), default=["plan", "memory", "cluster"]
    )
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "data" / "scale")
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 4], help="of the 70B")
    parser.add_argument(
        "--vocab", type=int, default=SHAPES["70B"].vocab, help="of the 70B; with fewer, more layers fit"
    )
    parser.add_argument("--cluster-layers", type=int, default=4, help="of the 8B")
    parser.add_argument("--shard-size", default="120MB", help="of the output on the cluster")
    parser.add_argument("--rounds", type=int, default=5, help="of the plan")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {"machine": machine()}
    try:
        for part in given.parts:
            shutil.rmtree(given.folder, ignore_errors=True)
            given.folder.mkdir(parents=True)
            if part == "plan":
                found[part] = plan(given.folder, given.rounds)
            elif part == "memory":
                found[part] = memory(given.folder, given.layers, given.vocab)
            else:
                found[part] = cluster(given.folder, given.cluster_layers, given.shard_size)
            for row in found[part]:
                print(part, json.dumps(row), flush=True)
    finally:
        with suppress(FileNotFoundError):
            shutil.rmtree(given.folder)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
