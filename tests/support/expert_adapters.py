"""Adapters of parameters that hold all experts, as PEFT trains them, also in the layout that PEFT had before 0.19."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from folded import learned
from tiny import loaded

PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
"""What `target_parameters` names in Qwen's, Mixtral's and most other models of experts."""


def on_experts(base: Path, adapter: Path, seed: int = 7, **settings: Any) -> Path:
    """An adapter of the experts of `base` and of its queries."""
    given = {"target_modules": ["q_proj"], "target_parameters": list(PARAMETERS)} | settings
    learned(base, adapter, seed=seed, **given)
    return adapter


def as_before_019(adapter: Path, folder: Path) -> Path:
    """The same adapter as PEFT 0.18 would have stored it for experts [experts, out, in] in memory.

    For that PEFT [experts, x, y] was [experts, in, out], so that its `lora_A` is [rank * experts, x].
    """
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    held = load_file(file)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for name in [name for name in held if ".experts." in name and ".lora_A." in name]:
        other = name.replace(".lora_A.", ".lora_B.")
        a, b = held[name], held[other]
        kind = "gate_up_proj" if ".base_layer." in name or len(config["target_parameters"]) == 1 else "down_proj"
        pattern = [rank for key, rank in config["rank_pattern"].items() if key.endswith(kind)]
        rank = (*pattern, config["r"])[0]
        each = a.reshape(-1, rank, a.shape[1]), b.reshape(len(b), rank, -1)
        held[name] = each[1].permute(2, 1, 0).reshape(-1, len(b)).contiguous()
        held[other] = each[0].permute(2, 1, 0).reshape(a.shape[1], -1).contiguous()
    save_file(held, file, metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_version": "0.18.1"}), encoding="utf-8")
    return folder


def merged_by_peft(base: Path, adapter: Path | None) -> dict[str, Tensor]:
    """Every parameter of a base with an adapter merged into it by PEFT, or without one."""
    model = loaded(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


_TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
_EXPERTS = {"num_experts": 3, "moe_intermediate_size": 24}


def qwen3_5(folder: Path, *, experts: bool) -> Path:
    """A tiny Qwen3.5, a layer of linear attention and one of the usual kind, with or without experts."""
    text = _TEXT | {
        "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2],
                            "partial_rotary_factor": 0.5},
    }  # fmt: skip
    text |= _EXPERTS | {"num_experts_per_tok": 2, "shared_expert_intermediate_size": 24} if experts else {}
    seen = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
            "spatial_merge_size": 2, "out_hidden_size": 32, "num_position_embeddings": 16}  # fmt: skip
    name = "Qwen3_5Moe" if experts else "Qwen3_5"
    return _saved(name, folder, text_config=text, vision_config=seen, tie_word_embeddings=False)


def gemma4(folder: Path, *, experts: bool) -> Path:
    """A tiny Gemma 4, with inputs for each layer, or with experts."""
    text = _TEXT | {
        "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 16, "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 0 if experts else 8,
    }  # fmt: skip
    text |= _EXPERTS | {"enable_moe_block": True, "top_k_experts": 2} if experts else {}
    seen = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 64}  # fmt: skip
    return _saved("Gemma4", folder, text_config=text, vision_config=seen, audio_config=None)


def _saved(name: str, folder: Path, **config: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = getattr(transformers, f"{name}Config")(**config)
        getattr(transformers, f"{name}ForConditionalGeneration")(made).float().save_pretrained(folder)
    return folder


def linear_modules(base: Path) -> list[str]:
    """The names of all linear layers of a model that PEFT can adapt, without a head."""
    model = loaded(base)
    found = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    return [name for name in found if not name.endswith("lm_head")]
