"""What the tests of merged adapters share: a tiny base, adapters that PEFT saves, and what PEFT reads from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

PREFIX = "base_model.model."
LAYER = "model.layers.{}.self_attn.{}"

PEFT_WARNINGS = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "`is_gradient_checkpointing` is deprecated",  # PEFT asks transformers by the old name
        "Setting `save_embedding_layers` to `True` as",
        "Adapter 'default'. . LoRA tensor.s. have invalid shape",  # it takes lora_B.bias for a broken factor
        "Could not find a config file in",  # it looks whether the vocabulary of the base was resized
        "Model has `tie_word_embeddings=True`",
        "Model with `tie_word_embeddings=True` and the tied_target_modules",
        "Input and output embeddings are no longer tied after merging",
        "You have requested `ensure_weight_tying`, but no tied modules are added",
        "`lora_bias=True` was passed but the targeted layer",
        "The following (rank|alpha)_pattern keys did not match",  # it looks for those of modules alone, and takes them
    )
]
"""Marks for tests in which PEFT trains or loads an adapter: what it warns of is what they are about."""


def llama(seed: int = 0) -> LlamaForCausalLM:
    """The base: the same weights for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
        return LlamaForCausalLM(
            LlamaConfig(**shape, **heads, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
        )


def adapter(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """An adapter as PEFT saves it, every trainable number of which is random."""
    peft = get_peft_model(llama(), LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"]} | settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    peft.to(dtype).save_pretrained(folder)
    return folder


def loaded(folder: Path, base: Any = None) -> PeftModel:
    """The base with an adapter, as PEFT loads it; it has a place for each tensor (and warns of places without)."""
    model = PeftModel.from_pretrained(base or llama(), folder)
    held = set(load_file(folder / "adapter_model.safetensors"))
    own = {
        name.replace(".default", "").replace(".modules_to_save", "")
        for name, _ in model.named_parameters()
        if ".default" in name or name.endswith(".original_module")
    }
    own |= {name for name, _ in model.named_parameters() if not any(part in name for part in (".default", "lora_"))}
    extra = {name for name in held if name not in own and not name.endswith("_delta")}
    assert not extra, f"PEFT has no place for {extra}"
    return model


def updates(model: PeftModel) -> dict[str, np.ndarray]:
    """What PEFT adds to the weight of each module, float64, as it lies in the base."""
    layers = {name.removeprefix(PREFIX): one for name, one in model.named_modules() if isinstance(one, LoraLayer)}
    return {
        name: one.get_delta_weight("default").detach().double().numpy()
        for name, one in layers.items()
        if "default" in one.r
    }


def exact_updates(folder: Path) -> dict[str, np.ndarray]:
    """The same, multiplied out in float64 from the factors and from the scaling that PEFT takes."""
    model = loaded(folder)
    found = {}
    for name, one in model.named_modules():
        if isinstance(one, LoraLayer):
            if one.lora_embedding_A:
                a, b = one.lora_embedding_A["default"], one.lora_embedding_B["default"]
            else:
                a, b = one.lora_A["default"].weight, one.lora_B["default"].weight
            product = b.detach().double() @ a.detach().double() * one.scaling["default"]
            found[name.removeprefix(PREFIX)] = (product.T if one.lora_embedding_A else product).numpy()
    return found


def total(folders: Sequence[Path], weight: Sequence[float]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The weighted sum of the updates of some adapters by module, and the largest magnitude that went into each."""
    sums: dict[str, np.ndarray] = {}
    sizes: dict[str, float] = {}
    for folder, number in zip(folders, weight, strict=True):
        for module, update in exact_updates(folder).items():
            sums[module] = sums.get(module, 0.0) + number * update
            sizes[module] = sizes.get(module, 0.0) + abs(number) * float(np.abs(update).max())
    return sums, sizes


def recipe(method: str, adapters: Sequence[object], weight: Any = 1.0, **more: Any) -> dict[str, Any]:
    """A recipe; `weight` is one for all or one for each, None for none; parameters may stand in `parameters`."""
    each = weight if isinstance(weight, list | tuple) else [weight] * len(adapters)
    models = [
        {"model": str(one)} | ({} if number is None else {"parameters": {"weight": number}})
        for one, number in zip(adapters, each, strict=True)
    ]
    return {"merge_method": method, "models": models} | more


def tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter, without the prefix of PEFT."""
    file = folder / "adapter_model.safetensors"
    return {name.removeprefix(PREFIX): tensor for name, tensor in load_file(file).items()}


def record(folder: Path) -> Any:
    return json.loads((folder / "polymerge.json").read_text())


def config(folder: Path) -> Any:
    return json.loads((folder / "adapter_config.json").read_text())


def close(got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], sizes: Any, share: float = 1e-6) -> None:
    """Each module's update is the wanted one, but for a share of its size (one number for all, or one a module)."""
    assert set(got) == set(wanted)
    for module, update in wanted.items():
        size = sizes[module] if isinstance(sizes, Mapping) else sizes
        np.testing.assert_allclose(got[module], update, rtol=0, atol=share * size, err_msg=module)
