"""Valid checkpoints that inputs are made from: a tiny one of every family, and a language model beside it.

They lie in a folder that differs from run to run; inputs, which do not, say `@SEEDS` for it.
"""

from __future__ import annotations

import json
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import report_made
import tiny
from tiny_configs import LLMS, VLMS

__all__ = ["ADAPTER", "FAMILIES", "PLACE", "SEEDS", "build_seeds", "lora_tensors", "seeds", "with_place"]

SEEDS = "POLYMERGE_FUZZ_SEEDS"
"""The variable that names their folder to the workers."""

PLACE = "@SEEDS"
FAMILIES = (*VLMS, *LLMS)

ADAPTER: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": f"{PLACE}/llama", "r": 2, "lora_alpha": 4,
    "target_modules": ["q_proj", "v_proj", "up_proj"], "bias": "none", "lora_dropout": 0.0, "inference_mode": True,
    "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "init_lora_weights": True, "rank_pattern": {},
    "alpha_pattern": {}, "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None,
    "trainable_token_indices": None, "exclude_modules": None, "peft_version": "0.17.0", "revision": None,
}  # fmt: skip


def build_seeds(folder: Path) -> None:
    """Write them: `FAMILY` and `FAMILY-llm` for each, two `adapters` of the tiny Llama, and `records` of runs."""
    folder.mkdir(parents=True)
    for family in VLMS:
        tiny.related_llm(tiny.build(family, folder / family, seed=0), folder / f"{family}-llm", seed=1)
    for family in LLMS:
        tiny.perturbed(tiny.build(family, folder / family, seed=0), folder / f"{family}-llm", seed=1)
    for name in ("a", "b"):
        (folder / "adapters" / name).mkdir(parents=True)
        config = json.dumps(ADAPTER).replace(PLACE, str(folder))
        (folder / "adapters" / name / "adapter_config.json").write_text(config, encoding="utf-8")
        save_file(lora_tensors(), folder / "adapters" / name / "adapter_model.safetensors", {"format": "pt"})
    report_made.small_merge(folder / "records")


@cache
def seeds() -> Path:
    """Their folder; they are made where nobody has made them before."""
    if SEEDS in os.environ:
        return Path(os.environ[SEEDS])
    folder = Path(tempfile.mkdtemp(prefix="polymerge-fuzz-seeds-")) / "seeds"
    build_seeds(folder)
    return folder


def with_place(data: bytes) -> bytes:
    """The bytes of an input, with the folder for `@SEEDS`."""
    return data.replace(PLACE.encode(), str(seeds()).encode())


def lora_tensors(rank: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The tensors of a LoRA adapter of the tiny Llama."""
    made = {}
    for layer in range(2):
        for module, out in (("self_attn.q_proj", 32), ("self_attn.v_proj", 16), ("mlp.up_proj", 48)):
            name = f"base_model.model.model.layers.{layer}.{module}"
            made[f"{name}.lora_A.weight"] = torch.linspace(-1, 1, rank * 32).reshape(rank, 32).to(dtype)
            made[f"{name}.lora_B.weight"] = torch.linspace(0, 1, out * rank).reshape(out, rank).to(dtype)
    return made
