"""Runs to report on: a small merge and its overlap as they are really made, and records of the other commands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polymerge.analysis.overlap import overlap
from polymerge.engine.merge import merge
from polymerge.engine.provenance import provenance
from polymerge.evaluation.results import Results, TaskResult
from polymerge.families.expressions import Read
from polymerge.planning.plan import Input, LeftOut, Piece, Plan, Step
from polymerge.recipe.parameters import Setting
from running import checkpoint, small_llama

SHA = "0" * 64


def write(file: Path, data: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return file


def small_merge(folder: Path, **more: Any) -> Path:
    """Two small Llamas merged on a third, and the overlap of their deltas beside it."""
    base, one, other = (
        checkpoint(folder / name, small_llama(seed)) for seed, name in enumerate(("base", "vlm", "math"))
    )
    recipe = {
        "merge_method": "ties",
        "template": str(one),
        "base_model": str(base),
        "models": [str(one), str(other)],
        "parameters": {"weight": 0.5, "density": 0.4},
        "exclude": ["*embed*"],
        **more,
    }
    out = merge(recipe, folder / "merged", check=False).folder
    write(folder / "merged" / "overlap.json", overlap(recipe).to_json())
    return out


def search(**more: Any) -> dict[str, Any]:
    return {
        "polymerge": "0.1.0", "vary": "weight", "values": [0.0, 0.2, 0.4, 0.6, 0.8], "criterion": "union",
        "compare": "exact", "smooth": 0, "candidates": [0.2, 0.4, 0.6], "differences": [31, 12, 40], "minima": [0.4],
        "chosen": 0.4, "chosen_by": "union", "scorer": "exact", "scores": [40.5, 51.25, 60.5, 55.0, 20.75], "best": 0.4,
        "plans": [SHA] * 5, "prompts": 100, "samples": 100, "seed": 2, "settings": {},
    } | more  # fmt: skip


def sampled_search() -> dict[str, Any]:
    """By a sampler, over two parameters of which one is no number."""
    return {
        "polymerge": "0.1.0", "vary": ["weight", "method"], "values": [[0.3, "ties"], [0.5, "linear"], [0.1, "ties"]],
        "scores": [50.0, 62.5, 41.0], "scorer": "exact", "sampler": "tpe", "trials": 3, "chosen_by": "exact",
        "best": [0.5, "linear"], "chosen": [0.5, "linear"], "prompts": 40, "samples": 40, "seed": 2, "settings": {},
    }  # fmt: skip


def results(name: str, source: str, samples: Mapping[str, list[float]]) -> dict[str, Any]:
    tasks = {}
    for task, marks in samples.items():
        share = sum(marks) / len(marks)
        ids = {str(place): mark for place, mark in enumerate(marks)}
        tasks[task] = TaskResult(100 * share, right=sum(marks), total=len(marks), samples=ids)
    return Results("polymerge", {"name": name, "source": source}, tasks).to_json()


def _third(drop: float, share: float | None, ends: list[float] | None) -> dict[str, Any]:
    return {
        "cells": 1, "drop": drop, "mean": drop, "mean_interval": None, "share": share, "share_interval": ends,
    }  # fmt: skip


def _thirds(drop: float, late: list[float] | None = None) -> dict[str, Any]:
    return {
        "drop": drop, "interval": [drop - 2.5, drop + 2.5], "undefined": 0.0, "early": _third(drop / 8, 0.125, None),
        "middle": _third(drop / 8, 0.125, None), "late": _third(drop * 0.75, 0.75, late),
    }  # fmt: skip


def knockout(late: list[float] | None = None) -> dict[str, Any]:
    """Of a model of three layers against its original, two tasks."""
    tasks = ("read", "sums")
    cells = []
    for task in tasks:
        for layer, third in enumerate(("early", "middle", "late")):
            drops = {"model": 4.25 * layer + 0.5, "against": 3.0 * layer, "difference": 1.25 * layer + 0.5}
            told = {who: {"drop": drop, "interval": [drop - 1.5, drop + 1.5]} for who, drop in drops.items()}
            for who in ("model", "against"):
                told[who] |= {"score": 60.0 - drops[who], "samples": None, "plan": SHA}
            cells.append({"task": task, "module": "mlp", "layers": [layer], "third": third, **told})
    summary = [
        {
            "task": task,
            "module": "mlp",
            "model": _thirds(14.25, late),
            "against": _thirds(9.0),
            "difference": _thirds(5.25),
        }
        for task in tasks
    ]
    return {
        "polymerge": "0.1.0", "model": "merged", "against": "vlm", "replace": "uniform", "scorer": "exact", "depth": 3,
        "modules": ["mlp"], "resamples": 2000, "seed": 42,
        "tasks": {task: {"prompts": 50, "ids": []} for task in tasks},
        "baseline": {who: {task: {"score": 61.5, "samples": None} for task in tasks} for who in ("model", "against")},
        "cells": cells, "summary": summary, "samples": 100, "sample_seed": 2, "settings": {},
    }  # fmt: skip


def ablation() -> dict[str, Any]:
    """Early layers gain more than the whole merge."""
    ranges = [
        {
            "name": name, "layers": layers, "plan": SHA, "recipe": {},
            "tasks": {
                "sums": {"score": 50 + gain, "gain": gain, "interval": [gain - 1.75, gain + 1.75], "samples": None}
            },
        }
        for name, layers, gain in (("early", [0], 7.5), ("late", [2], -3.25), ("full", [0, 1, 2], 4.5))
    ]  # fmt: skip
    return {
        "polymerge": "0.1.0", "template": "vlm", "scorer": "exact", "depth": 3, "resamples": 2000, "seed": 42,
        "tasks": {"sums": {"prompts": 50, "ids": []}}, "baseline": {"sums": {"score": 50.0, "samples": None}},
        "ranges": ranges, "samples": 100, "sample_seed": 2, "settings": {},
    }  # fmt: skip


def everything(folder: Path, **more: Any) -> list[Path]:
    """A run of every command."""
    merged = small_merge(folder, **more)
    template = str(folder / "vlm")
    ours = {"read": [1.0] * 12 + [0.0] * 8, "sums": [1.0, 0.0] * 10}
    before = {"read": [1.0] * 14 + [0.0] * 6, "sums": [1.0, 0.0, 0.0, 0.0] * 5}
    return [
        merged,
        write(folder / "search" / "search.json", search()).parent,
        write(folder / "trials" / "search.json", sampled_search()).parent,
        write(folder / "before" / "results.json", results("vlm", template, before)).parent,
        write(folder / "after" / "results.json", results("merged", str(merged), ours)).parent,
        write(folder / "knockout" / "knockout.json", knockout([0.6, 0.9])).parent,
        write(folder / "ablation" / "ablation.json", ablation()).parent,
    ]


def plan_of(layers: int) -> Plan:
    """The plan of a VLM with an LLM of so many layers: names and shapes as LLaVA-1.5 has them."""
    ends = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
            "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")  # fmt: skip
    steps = [
        Step(
            f"language_model.model.layers.{layer}.{end}.weight", f"text.layers.{layer}.{end}.weight", "merged", "BF16",
            "BF16", (4096, 4096),
            pieces=(Piece(f"text.layers.{layer}.{end}.weight", ((0, 4096),), 0, (Read("x"),) * 2),),
        )
        for layer in range(layers)
        for end in ends
    ]  # fmt: skip
    steps += [
        Step(f"vision_tower.vision_model.encoder.layers.{layer}.self_attn.{end}",
             f"vision.encoder.layers.{layer}.self_attn.{end}", "copied", "BF16", "BF16", (1024, 1024),
             "part vision is not merged")
        for layer in range(24)
        for end in ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias",
                    "out_proj.weight", "out_proj.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias",
                    "layer_norm1.weight", "layer_norm1.bias", "layer_norm2.weight", "layer_norm2.bias")
    ]  # fmt: skip
    steps.append(Step("lm_head.weight", "text.lm_head.weight", "tied", "BF16", "BF16", (9, 9), same_as="embed.weight"))
    inputs = tuple(
        Input(label, f"owner/{label}", f"/models/{label}", "llava", 9, 9, "", "") for label in ("vlm", "math")
    )
    setting = Setting("linear", {"weight": (0.9, 0.1), "normalize": True})
    return Plan(
        recipe={"merge_method": "linear"}, inputs=inputs, template=0, models=(0, 1), places=(0, 1), base=None, seed=42,
        settings=(setting,), steps=tuple(steps), left_out=(LeftOut(1, "lm_head.weight", "its vocabulary differs"),),
        warnings=("the vocabularies differ",),
    )  # fmt: skip


def record_of(plan: Plan) -> dict[str, Any]:
    output = {"files": {"model.safetensors": 1}, "tensors": {"merged": 1}, "parameters": 1, "merged": []}
    record: dict[str, Any] = json.loads(provenance(plan, {}, ["polymerge"], output))
    return record
