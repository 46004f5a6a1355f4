"""A CogVLM in a few lines, with the names of its published checkpoints: experts for text and for image tokens.

An image is four patches; they go through a gated projector, between two learned marks. What CogVLM has beyond that (a
transformer over the patches, one position for all of an image) is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import gelu, rms_norm, scaled_dot_product_attention, silu

Weights = Mapping[str, Tensor]
EPS = 1e-6


class TinyCogVLM(nn.Module):
    """Its state dict is what lies on disk."""

    def __init__(self, config: Mapping[str, Any], weights: Weights) -> None:
        super().__init__()
        self.config = dict(config)
        self.weights = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(weights[name]) for name in weights})

    @classmethod
    def grown(cls, config: Mapping[str, Any], llama: Weights, seen: int, seed: int) -> TinyCogVLM:
        """From a Llama's tensors: both experts are copies of what it has, the eyes are random."""
        hidden = config["hidden_size"]
        weights = {name: llama[name] for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight")}
        for layer in range(config["num_hidden_layers"]):
            own = f"model.layers.{layer}."
            for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
                weights[own + norm] = llama[own + norm]
            for expert in ("language", "vision"):
                fused = torch.cat([llama[f"{own}self_attn.{part}_proj.weight"] for part in "qkv"])
                weights[f"{own}self_attn.{expert}_expert_query_key_value.weight"] = fused
                weights[f"{own}self_attn.{expert}_expert_dense.weight"] = llama[own + "self_attn.o_proj.weight"]
                for part in ("gate", "up", "down"):
                    weights[f"{own}mlp.{expert}_mlp.{part}_proj.weight"] = llama[f"{own}mlp.{part}_proj.weight"]
        generator = torch.Generator().manual_seed(seed)
        shapes = {
            "patch_embedding.proj.weight": (hidden, seen),
            "linear_proj.linear_proj.weight": (hidden, hidden),
            "linear_proj.gate_proj.weight": (hidden, hidden),
            "linear_proj.dense_h_to_4h.weight": (hidden, hidden),
            "linear_proj.dense_4h_to_h.weight": (hidden, hidden),
            "boi": (1, 1, hidden),
            "eoi": (1, 1, hidden),
        }
        for name, shape in shapes.items():
            weights["model.vision." + name] = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        return cls(config, {name: tensor.clone() for name, tensor in weights.items()})

    @classmethod
    def loaded(cls, folder: Path) -> TinyCogVLM:
        """From a checkpoint, every tensor of which has its place."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        files = sorted(folder.glob("*.safetensors"))
        return cls(config, {name: tensor for file in files for name, tensor in load_file(file).items()})

    def save(self, folder: Path) -> Path:
        """Write it under the names of CogVLM."""
        folder.mkdir(parents=True)
        tensors = {name.replace("/", "."): tensor.detach().clone() for name, tensor in self.weights.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config), encoding="utf-8")
        return folder

    def forward(self, words: Tensor, patches: Tensor | None = None) -> Tensor:
        """Logits after the last of `words` [batch, n]; `patches` [batch, count, seen] come before them."""
        x = self._weight("model.embed_tokens")[words]
        image = torch.zeros(x.shape[1], dtype=torch.bool)
        if patches is not None:
            seen = self._seen(patches)
            x = torch.cat([seen, x], dim=1)
            image = torch.arange(x.shape[1]) < seen.shape[1]
        for layer in range(self.config["num_hidden_layers"]):
            own = f"model.layers.{layer}."
            x = x + self._attention(own, self._norm(own + "input_layernorm", x), image)
            x = x + self._mlp(own + "mlp.", self._norm(own + "post_attention_layernorm", x), image)
        return self._norm("model.norm", x[:, -1]) @ self._weight("lm_head").T

    def _weight(self, name: str) -> Tensor:
        return self.weights[f"{name}.weight".replace(".", "/")]

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return rms_norm(x, x.shape[-1:], self._weight(name), EPS)

    def _expert(self, names: str, x: Tensor, image: Tensor) -> Tensor:
        """Each token through the matrix of its kind; `names` has a gap for the expert's."""
        text, seen = (x @ self._weight(names.format(expert)).T for expert in ("language", "vision"))
        return torch.where(image[None, :, None], seen, text)

    def _seen(self, patches: Tensor) -> Tensor:
        x = patches @ self._weight("model.vision.patch_embedding.proj").T
        own = "model.vision.linear_proj."
        x = gelu(x @ self._weight(own + "linear_proj").T)
        x = silu(x @ self._weight(own + "gate_proj").T) * (x @ self._weight(own + "dense_h_to_4h").T)
        marks = (self.weights[f"model/vision/{mark}"].expand(len(x), -1, -1) for mark in ("boi", "eoi"))
        before, after = marks
        return torch.cat([before, x @ self._weight(own + "dense_4h_to_h").T, after], dim=1)

    def _attention(self, own: str, x: Tensor, image: Tensor) -> Tensor:
        batch, count, hidden = x.shape
        heads = self.config["num_attention_heads"]
        fused = self._expert(own + "self_attn.{}_expert_query_key_value", x, image)
        q, k, v = (part.reshape(batch, count, heads, -1).transpose(1, 2) for part in fused.split(hidden, dim=-1))
        mixed = scaled_dot_product_attention(_turned(q), _turned(k), v, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(batch, count, hidden)
        return self._expert(own + "self_attn.{}_expert_dense", mixed, image)

    def _mlp(self, own: str, x: Tensor, image: Tensor) -> Tensor:
        gate, up = (self._expert(own + f"{{}}_mlp.{part}_proj", x, image) for part in ("gate", "up"))
        return self._expert(own + "{}_mlp.down_proj", silu(gate) * up, image)


def _turned(x: Tensor) -> Tensor:
    """Rotary positions, as a Llama has them: the first half of a head is turned with the second."""
    count, width = x.shape[-2:]
    angles = torch.arange(count)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    cosine, sine = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine
