"""A tiny InternVL checkpoint as OpenGVLab published it: the one family here that has no class in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_configs import HIDDEN, TOWER, decoder

WIDTH, BLOCKS = TOWER["hidden_size"], TOWER["num_hidden_layers"]

CODE = '"""Stands for the modelling code that is published beside the weights."""\n'
CODE_FILES = ("configuration_internvl_chat.py", "modeling_internvl_chat.py")


def config(kind: str, layers: int, rows: int, tie: bool, dtype: str) -> dict[str, Any]:
    """config.json, with the decoder under `llm_config` and the classes under `auto_map`."""
    architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "internlm2": "InternLM2ForCausalLM"}[kind]
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
        },
        "downsample_ratio": 0.5,
        "llm_config": {**decoder(kind, layers, rows, tie), "architectures": [architecture], "torch_dtype": dtype},
        "model_type": "internvl_chat",
        "ps_version": "v2",
        "select_layer": -1,
        "tie_word_embeddings": tie,
        "torch_dtype": dtype,
        "vision_config": {"architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", **TOWER},
    }


def shapes(kind: str, layers: int, rows: int, tie: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint."""
    text = internlm2(layers, rows) if kind == "internlm2" else llama_like(layers, rows, tie, biases=kind == "qwen2")
    return {**eyes(), **{f"language_model.{name}": shape for name, shape in text.items()}}


def eyes() -> dict[str, tuple[int, ...]]:
    """The vision tower and the projector, which joins four patches into one."""
    block = {
        "attn.qkv.weight": (3 * WIDTH, WIDTH), "attn.qkv.bias": (3 * WIDTH,),
        "attn.proj.weight": (WIDTH, WIDTH), "attn.proj.bias": (WIDTH,),
        "mlp.fc1.weight": (24, WIDTH), "mlp.fc1.bias": (24,), "mlp.fc2.weight": (WIDTH, 24), "mlp.fc2.bias": (WIDTH,),
        "norm1.weight": (WIDTH,), "norm1.bias": (WIDTH,), "norm2.weight": (WIDTH,), "norm2.bias": (WIDTH,),
        "ls1": (WIDTH,), "ls2": (WIDTH,),
    }  # fmt: skip
    return {
        "vision_model.embeddings.class_embedding": (1, 1, WIDTH),
        "vision_model.embeddings.patch_embedding.weight": (WIDTH, 3, 4, 4),
        "vision_model.embeddings.patch_embedding.bias": (WIDTH,),
        "vision_model.embeddings.position_embedding": (1, 17, WIDTH),
        **{f"vision_model.encoder.layers.{i}.{name}": shape for i in range(BLOCKS) for name, shape in block.items()},
        "mlp1.0.weight": (4 * WIDTH,), "mlp1.0.bias": (4 * WIDTH,),
        "mlp1.1.weight": (HIDDEN, 4 * WIDTH), "mlp1.1.bias": (HIDDEN,),
        "mlp1.3.weight": (HIDDEN, HIDDEN), "mlp1.3.bias": (HIDDEN,),
    }  # fmt: skip


def llama_like(layers: int, rows: int, tie: bool, *, biases: bool) -> dict[str, tuple[int, ...]]:
    """A Llama decoder, or a Qwen2 one, which has biases on q, k and v."""
    half = HIDDEN // 2
    layer = {
        "input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN), "self_attn.k_proj.weight": (half, HIDDEN),
        "self_attn.v_proj.weight": (half, HIDDEN), "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (48, HIDDEN), "mlp.up_proj.weight": (48, HIDDEN), "mlp.down_proj.weight": (HIDDEN, 48),
    }  # fmt: skip
    if biases:
        layer |= {
            "self_attn.q_proj.bias": (HIDDEN,),
            "self_attn.k_proj.bias": (half,),
            "self_attn.v_proj.bias": (half,),
        }
    return {
        "model.embed_tokens.weight": (rows, HIDDEN),
        **{f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()},
        "model.norm.weight": (HIDDEN,),
        **({} if tie else {"lm_head.weight": (rows, HIDDEN)}),
    }


def internlm2(layers: int, rows: int) -> dict[str, tuple[int, ...]]:
    """An InternLM2 decoder: q, k and v in one tensor, and names of its own."""
    layer = {
        "attention_norm.weight": (HIDDEN,), "ffn_norm.weight": (HIDDEN,),
        "attention.wqkv.weight": (2 * HIDDEN, HIDDEN), "attention.wo.weight": (HIDDEN, HIDDEN),
        "feed_forward.w1.weight": (48, HIDDEN), "feed_forward.w2.weight": (HIDDEN, 48),
        "feed_forward.w3.weight": (48, HIDDEN),
    }  # fmt: skip
    return {
        "model.tok_embeddings.weight": (rows, HIDDEN),
        **{f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()},
        "model.norm.weight": (HIDDEN,),
        "output.weight": (rows, HIDDEN),
    }


def write_config(folder: Path, settings: dict[str, Any]) -> None:
    """Write config.json and the code it points to."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    for name in CODE_FILES:
        (folder / name).write_text(CODE, encoding="utf-8")
