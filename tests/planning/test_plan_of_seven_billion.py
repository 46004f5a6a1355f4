"""Plans of models of published size, from headers alone: files full of holes, no weights on any disk.

The names are those of published checkpoints (golden/names.json), the shapes those of their configs: LLaVA 1.5 7B in its
two layouts, mPLUG-Owl2 7B, CogVLM 17B and CogVLM2 19B, whose queries share keys.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest

import published
from polymerge.errors import Refused
from polymerge.planning import Plan, make_plan
from polymerge.planning.estimate import memory_estimate
from polymerge.planning.text import describe

WIDTH, INNER = 4096, 11008
Shape = tuple[int, ...]


def names_of(checkpoint: str) -> list[str]:
    """The names of a published checkpoint, all numbers written out."""
    (found,) = (published.names_of(entry) for entry in published.PUBLISHED if entry["checkpoint"] == checkpoint)
    return list(found)


def all_layers(names: Iterable[str]) -> list[str]:
    """Those of a list of three layers, for 32."""
    kept = [name for name in names if not name.startswith(("model.layers.1.", "model.layers.2."))]
    every = [name.replace("layers.0.", f"layers.{i}.") for name in kept if "model.layers.0." in name for i in range(32)]
    return [name for name in kept if "model.layers.0." not in name] + every


def text_shape(name: str, rows: int, inner: int = INNER, keys: int = WIDTH) -> Shape:
    """The shape of a tensor of the decoder."""
    if "embed_tokens" in name or "lm_head" in name:
        return (rows, WIDTH)
    if "norm" in name:
        return (WIDTH,)
    if name.endswith("inv_freq"):
        return (64,)
    if "query_key_value" in name:
        return (WIDTH + 2 * keys, WIDTH)[: 1 if name.endswith("bias") else 2]
    if "down_proj" in name:
        return (WIDTH, inner)
    return (inner if ".mlp." in name else WIDTH, WIDTH)


def checkpoint(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Shape], shards: int = 2) -> Path:
    """Write headers, and as many bytes that are not there as they speak of."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        header, end = {}, 0
        for name in list(tensors)[shard::shards]:
            start, end = end, end + 2 * prod(tensors[name])
            header[name] = {"dtype": "BF16", "shape": tensors[name], "data_offsets": [start, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return folder


SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 32, "num_attention_heads": 32, "tie_word_embeddings": False}


def llava(folder: Path) -> Path:
    names = names_of("liuhaotian/llava-v1.5-7b")
    shapes = {name: (WIDTH, 1024) if "mm_projector" in name else text_shape(name, 32000) for name in names}
    config = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "vocab_size": 32000, **SIZES}
    return checkpoint(folder, config, shapes)


def llava_hf(folder: Path) -> Path:
    names = names_of("llava-hf/llava-1.5-7b-hf")
    shapes = {name: text_shape(name, 32064) if "language_model" in name else (1024, 1024) for name in names}
    text = {"model_type": "llama", "vocab_size": 32064, **SIZES}
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": text}
    return checkpoint(folder, config, shapes)


def owl(folder: Path) -> Path:
    names = all_layers(names_of("MAGAer13/mplug-owl2-llama2-7b (names of 3 layers)"))
    shapes = {name: (1024, 1024) if "visual" in name or "vision" in name else text_shape(name, 32000) for name in names}
    config = {"model_type": "mplug_owl2", "architectures": ["MPLUGOwl2LlamaForCausalLM"], **SIZES}
    return checkpoint(folder, config, shapes)


def cog(folder: Path) -> Path:
    names = all_layers(names_of("THUDM/cogvlm-chat-hf (names of 3 layers, of the code that converts and loads it)"))
    shapes = {name: (1792, 1792) if "model.vision." in name else text_shape(name, 32000) for name in names}
    return checkpoint(folder, {"architectures": ["CogVLMForCausalLM"], "vocab_size": 32000, **SIZES}, shapes)


def cog2(folder: Path) -> Path:
    names = names_of("THUDM/cogvlm2-llama3-chat-19B")
    shapes = {
        name: (1792, 1792) if "model.vision." in name else text_shape(name, 128256, 14336, 1024) for name in names
    }
    config = {"architectures": ["CogVLMForCausalLM"], "vocab_size": 128256, "num_multi_query_heads": 8, **SIZES}
    return checkpoint(folder, config, shapes)


def recipe(template: Path, source: Path, **more: Any) -> dict[str, Any]:
    models = [{"model": str(one), "parameters": {"weight": 0.5}} for one in (template, source)]
    return {"merge_method": "linear", "models": models, **more}


def complete(plan: Plan, template: Path, source: Path) -> bool:
    """Whether every tensor of both has one fate and every merged row is merged once."""
    indexes = [
        json.loads((one / "model.safetensors.index.json").read_text("utf-8"))["weight_map"]
        for one in (template, source)
    ]
    steps = {step.name for step in plan.steps}
    read = {name for _, piece, _ in plan.merged_pieces() for name in _names(piece.reads[1])}
    left = {entry.name for entry in plan.left_out if entry.input == plan.models[1]}
    whole = all(
        sorted(row for piece in step.pieces for row in piece.rows)[-1][1] == step.shape[0]
        and sum(stop - start for piece in step.pieces for start, stop in piece.rows) == step.shape[0]
        for step in plan.steps
        if step.pieces
    )
    return whole and steps == set(indexes[0]) and read | left == set(indexes[1]) and not read & left


def _names(expr: Any) -> set[str]:
    if hasattr(expr, "name"):
        return {expr.name}
    return set().union(*map(_names, expr.of)) if isinstance(expr.of, tuple) else _names(expr.of)


@pytest.mark.parametrize(
    ("template", "source", "merged"),
    [
        # 32 layers: two experts of a fused tensor, an output and three of the MLP, two norms; and three outside
        (cog, llava, 32 * (2 * 5 + 2) + 3),
        (cog, owl, 32 * (2 * 5 + 2) + 3),
        # seven and two norms; norms, keys and values twice
        (llava, cog, 32 * 9 + 3),
        (owl, llava, 32 * (9 + 4) + 3),
        (owl, cog, 32 * (9 + 4) + 3),
        # 64 rows of padding: embedding and head are kept
        (llava_hf, cog, 32 * 9 + 1),
    ],
)
def test_a_pair_is_planned_from_headers(
    template: Callable[[Path], Path], source: Callable[[Path], Path], merged: int, tmp_path: Path
) -> None:
    first, second = template(tmp_path / "template"), source(tmp_path / "source")
    plan = make_plan(recipe(first, second))
    assert complete(plan, first, second)
    assert plan.counts()["merged"] == merged
    assert plan.counts()["merged"] + plan.counts()["copied"] == len(plan.steps)
    assert plan.size > 13e9
    assert memory_estimate(plan, threads=32) < 1e9
    assert len(describe(plan).splitlines()) < 60
    assert make_plan(json.loads(json.dumps(plan.to_json()))) == plan


def test_what_is_on_the_disk_is_headers(tmp_path: Path) -> None:
    files = list(cog(tmp_path / "cog").glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > 20e9
    assert sum(512 * file.stat().st_blocks for file in files) < 2e6


def test_two_generations_of_cogvlm_do_not_fit_and_every_reason_is_said_at_once(tmp_path: Path) -> None:
    other, into = cog(tmp_path / "cog"), cog2(tmp_path / "cog2")
    with pytest.raises(Refused) as refused:
        make_plan(recipe(into, other))
    said = str(refused.value)
    assert "'cog' is [4096, 4096], template 'cog2' is [1024, 4096]" in said
    assert "mlp.gate_proj.weight@text (32 tensors): 'cog' is [11008, 4096], template 'cog2' is [14336, 4096]" in said
    assert "self_attn.q_proj.bias@image (32 tensors): template 'cog2' has it, 'cog' does not" in said


def test_cogvlm2_is_planned_with_itself(tmp_path: Path) -> None:
    """Grouped queries, and biases that only the vision experts have."""
    one, other = (cog2(tmp_path / name) for name in ("one", "other"))
    plan = make_plan(recipe(one, other, parts=["text"]))
    assert complete(plan, one, other)
    (step,) = (s for s in plan.steps if s.name == "model.layers.7.self_attn.vision_expert_query_key_value.bias")
    assert [piece.rows for piece in step.pieces] == [((0, 4096),), ((4096, 5120),), ((5120, 6144),)]
