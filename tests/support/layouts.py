"""One text tower in the layouts of several families: split or fused, once or with a branch for image tokens.

    tower = random_tower(Sizes(heads=4), seed=1)              # plain canonical names -> tensors, branches beside them
    folder = write("cogvlm", tmp_path / "cog", tower, Sizes(heads=4))
    text_of("cogvlm", folder, Sizes(heads=4)) == tower        # cut apart again, without polymerge

The names on disk are written down here once more, so that the tables of polymerge are not checked against themselves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]

ATTENTION = tuple(f"self_attn.{part}_proj.weight" for part in "qkvo")
MLP = tuple(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
BIASES = tuple(f"self_attn.{part}_proj.bias" for part in "qkv")
KEYS_AND_VALUES = ATTENTION[1:3]
QUERIES_KEYS_VALUES: Mapping[str, tuple[str, ...]] = {"weight": ATTENTION[:3], "bias": BIASES}
OUTER = ("embed_tokens.weight", "norm.weight", "lm_head.weight")

TWICE: Mapping[str, tuple[str, ...]] = {"cogvlm": (*ATTENTION, *MLP), "mplug_owl2": (*NORMS, *KEYS_AND_VALUES)}
"""By layout, what a layer has for image tokens too."""

CONFIGS: Mapping[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "llava": {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]},
    "llava_original": {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]},
    "mplug_owl2": {"model_type": "mplug_owl2", "architectures": ["MPLUGOwl2LlamaForCausalLM"]},
    "minicpm_v": {"model_type": "minicpmv", "architectures": ["MiniCPMV"]},
    "cogvlm": {"architectures": ["CogVLMForCausalLM"]},
}
LAYOUTS = tuple(CONFIGS)

FUSED_CONFIGS: Mapping[str, dict[str, Any]] = {
    "phi3": {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]},
    "internlm2": {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"]},
    "molmo": {"model_type": "molmo", "architectures": ["MolmoForCausalLM"]},
}
FUSED = tuple(FUSED_CONFIGS)
"""Layouts of language models that fuse queries, keys and values, and some of them gate and up."""

OWN_NAMES: Mapping[str, Mapping[str, str]] = {
    "phi3": {"qkv": "self_attn.qkv_proj.weight", "mlp": "mlp.gate_up_proj.weight"},
    "internlm2": {
        "embed_tokens.weight": "model.tok_embeddings.weight", "lm_head.weight": "output.weight",
        "qkv": "attention.wqkv.weight", ATTENTION[3]: "attention.wo.weight",
        MLP[0]: "feed_forward.w1.weight", MLP[1]: "feed_forward.w3.weight", MLP[2]: "feed_forward.w2.weight",
        NORMS[0]: "attention_norm.weight", NORMS[1]: "ffn_norm.weight",
    },
    "molmo": {
        "embed_tokens.weight": "model.transformer.wte.embedding", "norm.weight": "model.transformer.ln_f.weight",
        "lm_head.weight": "model.transformer.ff_out.weight", "layers": "model.transformer.blocks",
        "qkv": "att_proj.weight", "mlp": "ff_proj.weight", ATTENTION[3]: "attn_out.weight", MLP[2]: "ff_out.weight",
        NORMS[0]: "attn_norm.weight", NORMS[1]: "ff_norm.weight",
    },
}  # fmt: skip
"""By layout, what is not called as in a Llama."""

PREFIXES: Mapping[str, tuple[str, str]] = {
    "llava": ("language_model.model.", "language_model.lm_head.weight"),
    "minicpm_v": ("llm.model.", "llm.lm_head.weight"),
}
"""Where decoder and head lie, if not under `model.` and at the root."""

OUTSIDE: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "llama": {},
    "llava": {
        "vision_tower.vision_model.post_layernorm.weight": (5,),
        "multi_modal_projector.linear_1.weight": (3, 5),
    },
    "llava_original": {"model.mm_projector.0.weight": (3, 5), "model.mm_projector.0.bias": (3,)},
    "mplug_owl2": {"model.vision_model.post_layernorm.weight": (5,), "model.visual_abstractor.visual_fc.bias": (3,)},
    "minicpm_v": {"vpm.post_layernorm.weight": (5,), "resampler.query": (2, 3)},
    "cogvlm": {"model.vision.boi": (1, 1, 3), "model.vision.linear_proj.norm1.bias": (3,)},
    "phi3": {},
    "internlm2": {},
    "molmo": {"model.transformer.wte.new_embedding": (2, 3), "model.vision_backbone.image_vit.class_embedding": (3,)},
}
"""Tensors of the other parts."""

BUFFER = "model.layers.{}.self_attn.rotary_emb.inv_freq"
WITH_BUFFERS = ("llama", "llava_original", "mplug_owl2", "cogvlm")
"""The layouts that old checkpoints store rotary frequencies in."""


@dataclass(frozen=True)
class Sizes:
    """How large a decoder is; `shared` heads of keys and values, as many as of queries if none are said."""

    heads: int = 4
    width: int = 3
    shared: int = 0
    hidden: int = 12
    inner: int = 7
    rows: int = 10
    layers: int = 2

    @property
    def queries(self) -> int:
        """Rows of queries."""
        return self.heads * self.width

    @property
    def keys(self) -> int:
        """Rows of keys, and of values."""
        return (self.shared or self.heads) * self.width

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of a layer."""
        if name in NORMS:
            return (self.hidden,)
        shapes = {
            "q_proj": (self.queries, self.hidden),
            "o_proj": (self.hidden, self.queries),
            "down_proj": (self.hidden, self.inner),
        }
        other = (self.inner, self.hidden) if name in MLP else (self.keys, self.hidden)
        shape = shapes.get(name.split(".")[1], other)
        return shape[:1] if name in BIASES else shape


def config_of(layout: str, sizes: Sizes) -> dict[str, Any]:
    """Its config.json, with the text tower nested where the family nests it."""
    text: dict[str, Any] = {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "vocab_size": sizes.rows,
        "tie_word_embeddings": False,
    }
    if sizes.hidden != sizes.queries:
        text["head_dim"] = sizes.width
    if sizes.shared:
        text["num_multi_query_heads" if layout == "cogvlm" else "num_key_value_heads"] = sizes.shared
    if layout == "llava":
        return CONFIGS[layout] | {"text_config": text | {"model_type": "llama"}, "tie_word_embeddings": False}
    if layout == "molmo":
        text["intermediate_size"] *= 2  # counts gate and up
    return {**CONFIGS, **FUSED_CONFIGS}[layout] | text


def random_tower(sizes: Sizes, seed: int, twice: tuple[str, ...] = (), dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """A decoder by plain canonical names; what is in `twice` has `@image` beside it."""
    generator = torch.Generator().manual_seed(seed)
    shapes = tower_shapes(sizes, twice)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def tower_shapes(sizes: Sizes, twice: tuple[str, ...] = (), more: tuple[str, ...] = ()) -> dict[str, tuple[int, ...]]:
    """The shapes of such a decoder; `more` is what its layers have beyond a Llama's, such as biases."""
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (sizes.rows, sizes.hidden),
        "norm.weight": (sizes.hidden,),
        "lm_head.weight": (sizes.rows, sizes.hidden),
    }
    for layer in range(sizes.layers):
        for name in (*ATTENTION, *MLP, *NORMS):
            shapes[f"layers.{layer}.{name}"] = sizes.shape(name)
            if name in twice:
                shapes[f"layers.{layer}.{name}@image"] = sizes.shape(name)
        shapes |= {f"layers.{layer}.{name}": sizes.shape(name.partition("@")[0]) for name in more}
    return shapes


def write(layout: str, folder: Path, tower: Tensors, sizes: Sizes, *, seed: int = 0) -> Path:
    """Write a checkpoint; what the tower has no `@image` of is the same for both kinds of tokens."""
    tensors = stored(layout, tower, sizes)
    generator = torch.Generator().manual_seed(seed)
    dtype = tower["norm.weight"].dtype
    for name, shape in OUTSIDE[layout].items():
        tensors[name] = torch.randn(shape, generator=generator).to(dtype)
    if layout in WITH_BUFFERS:
        for layer in range(sizes.layers):
            tensors[BUFFER.format(layer)] = torch.rand(2, generator=generator)
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(layout, sizes)), encoding="utf-8")
    return folder


def stored(layout: str, tower: Tensors, sizes: Sizes) -> Tensors:
    """The text tower under its names on disk."""
    found = {_own_name(layout, name): tower[name] for name in OUTER if name in tower}
    for layer in range(sizes.layers):
        for way, branch in enumerate(("", "@image")):
            own = {
                name: tower[f"layers.{layer}.{name}{held}"]
                for name in (*ATTENTION, *MLP, *NORMS, *BIASES)
                for held in ("", branch)  # that of the branch, where there is one
                if f"layers.{layer}.{name}{held}" in tower
            }
            prefix = f"{_own_name(layout, 'layers')}.{layer}."
            found |= {prefix + name: tensor for name, tensor in _layer(layout, own, way, sizes).items()}
    return found


def _own_name(layout: str, name: str) -> str:
    """What a layout calls a tensor outside the layers."""
    body, head = PREFIXES.get(layout, ("model.", "lm_head.weight"))
    return OWN_NAMES.get(layout, {}).get(name, head if name == "lm_head.weight" else body + name)


def _layer(layout: str, own: Tensors, way: int, sizes: Sizes) -> Tensors:
    """One branch of a layer (0 text, 1 image), under its names on disk."""
    if layout in FUSED:
        return _fused_layer(layout, own, sizes) if way == 0 else {}
    if layout == "cogvlm":
        expert = ("language", "vision")[way]
        fused = {kind: [own[name] for name in names if name in own] for kind, names in QUERIES_KEYS_VALUES.items()}
        return {
            **{
                f"self_attn.{expert}_expert_query_key_value.{kind}": torch.cat(blocks)
                for kind, blocks in fused.items()
                if blocks
            },
            f"self_attn.{expert}_expert_dense.weight": own[ATTENTION[3]],
            **{name.replace("mlp.", f"mlp.{expert}_mlp."): own[name] for name in MLP},
            **{name: own[name] for name in NORMS if way == 0},
        }
    if layout == "mplug_owl2":
        doubled = TWICE[layout]
        single = {name: own[name] for name in own if name not in doubled and way == 0}
        return single | {name.replace(".weight", f".multiway.{way}.weight"): own[name] for name in doubled}
    return own if way == 0 else {}


def _fused_layer(layout: str, own: Tensors, sizes: Sizes) -> Tensors:
    names, left = OWN_NAMES[layout], dict(own)
    fused = {}
    for kind, parts in QUERIES_KEYS_VALUES.items():
        if parts[0] not in left:
            continue
        q, k, v = (left.pop(name) for name in parts)
        blocks = [q, k, v]
        if layout == "internlm2":  # each head of keys after the queries that share it, and before its values
            share = sizes.queries // sizes.keys * sizes.width
            blocks = [
                part
                for group in zip(q.split(share), *(t.split(sizes.width) for t in (k, v)), strict=True)
                for part in group
            ]
        fused[names["qkv"].replace("weight", kind)] = torch.cat(blocks)
    if "mlp" in names:
        gate, up = (left.pop(name) for name in MLP[:2])
        fused[names["mlp"]] = torch.cat([up, gate] if layout == "molmo" else [gate, up])
    return fused | {names.get(name, name): tensor for name, tensor in left.items()}


def text_of(layout: str, folder: Path, sizes: Sizes) -> Tensors:
    """A checkpoint's text tower by canonical names, as `random_tower` has it."""
    return tower_of(layout, load(folder), sizes)


def tower_of(layout: str, disk: Tensors, sizes: Sizes) -> Tensors:
    """The text tower among the tensors of a checkpoint, cut apart."""
    tower = {name: disk[_own_name(layout, name)] for name in OUTER if _own_name(layout, name) in disk}
    for layer in range(sizes.layers):
        own = f"{_own_name(layout, 'layers')}.{layer}."
        for name in (*ATTENTION, *MLP, *NORMS, *BIASES):
            twice = name in TWICE.get(layout, ()) or (layout == "cogvlm" and name in BIASES)
            for way, branch in enumerate(("", "@image") if twice else ("",)):
                held = own + _held_in(layout, name, way)
                if name not in BIASES or held in disk:
                    tower[f"layers.{layer}.{name}{branch}"] = _cut(layout, disk[held], name, sizes)
    return tower


def _held_in(layout: str, name: str, way: int) -> str:
    """The tensor of a layer that one of a branch lies in."""
    kind = name.rpartition(".")[2]
    joined = name in QUERIES_KEYS_VALUES[kind]
    if layout in FUSED:
        names = OWN_NAMES[layout]
        if name in MLP[:2] and "mlp" in names:
            return names["mlp"]
        return names["qkv"].replace("weight", kind) if joined else names.get(name, name)
    if layout == "mplug_owl2" and name in TWICE[layout]:
        return name.replace(".weight", f".multiway.{way}.weight")
    if layout != "cogvlm" or name in NORMS:
        return name
    expert = ("language", "vision")[way]
    if name in MLP:
        return name.replace("mlp.", f"mlp.{expert}_mlp.")
    return f"self_attn.{expert}_expert_{'query_key_value' if joined else 'dense'}.{kind}"


def _cut(layout: str, whole: Tensor, name: str, sizes: Sizes) -> Tensor:
    """One tensor out of that which holds it."""
    if layout in FUSED and name in MLP[:2] and "mlp" in OWN_NAMES[layout]:
        return whole.chunk(2)[MLP.index(name) ^ (layout == "molmo")]
    place = next((parts.index(name) for parts in QUERIES_KEYS_VALUES.values() if name in parts), None)
    if place is None or layout not in (*FUSED, "cogvlm"):
        return whole
    if layout != "internlm2":
        return whole.split([sizes.queries, sizes.keys, sizes.keys])[place]
    groups = whole.reshape(sizes.keys // sizes.width, -1, sizes.width, *whole.shape[1:])
    return (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])[place].reshape(-1, *whole.shape[1:])


def load(folder: Path) -> Tensors:
    """All tensors of a checkpoint."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def outside(layout: str, tensors: Tensors) -> set[str]:
    """The names that are not of the text tower, or are buffers."""
    return {name for name in tensors if name in OUTSIDE[layout] or name.endswith("inv_freq")}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the very same bytes."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )
