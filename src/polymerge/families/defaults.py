"""What the config classes of transformers have for a value that config.json leaves out.

transformers 4 leaves what equals a class's default out of nested configs. Only values that its versions agree on, and
only those that say how weights are used: sizes are in the tables of the families.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

__all__ = ["CLASS_DEFAULTS"]

_QWEN_VL: Final = {
    "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "use_sliding_window": False,
}  # fmt: skip
_GEMMA: Final = {"head_dim": 256, "rms_norm_eps": 1e-6, "attention_bias": False}

CLASS_DEFAULTS: Final[Mapping[str, Mapping[str, object]]] = MappingProxyType(
    {
        "llama": {
            "num_attention_heads": 32, "num_key_value_heads": None, "hidden_size": 4096, "hidden_act": "silu",
            "rms_norm_eps": 1e-6, "rope_theta": 1e4, "attention_bias": False, "mlp_bias": False,
        },
        "mistral": {
            "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096, "hidden_act": "silu",
            "rms_norm_eps": 1e-6, "rope_theta": 1e4, "sliding_window": 4096,
        },
        "mixtral": {
            "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096, "hidden_act": "silu",
            "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "num_experts_per_tok": 2,
        },
        "qwen2": {
            "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 4096, "hidden_act": "silu",
            "rms_norm_eps": 1e-6, "rope_theta": 1e4, "use_sliding_window": False,
        },
        "qwen2_vl_text": _QWEN_VL,
        "qwen2_5_vl_text": _QWEN_VL,
        "qwen3": {
            "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "hidden_size": 4096,
            "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4, "use_sliding_window": False,
            "attention_bias": False,
        },
        "qwen3_moe": {
            "num_attention_heads": 32, "num_key_value_heads": 4, "hidden_size": 2048, "hidden_act": "silu",
            "rms_norm_eps": 1e-6, "rope_theta": 1e4, "use_sliding_window": False, "num_experts_per_tok": 8,
            "norm_topk_prob": False, "attention_bias": False,
        },
        "gemma": _GEMMA | {"num_attention_heads": 16, "num_key_value_heads": 16, "rope_theta": 1e4},
        "gemma2": _GEMMA | {
            "num_attention_heads": 8, "num_key_value_heads": 4, "rope_theta": 1e4, "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096,
        },
        "gemma3_text": _GEMMA | {
            "num_attention_heads": 8, "num_key_value_heads": 4, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
            "query_pre_attn_scalar": 256, "attn_logit_softcapping": None, "final_logit_softcapping": None,
            "sliding_window": 4096,
        },
        "phi3": {
            "num_attention_heads": 32, "num_key_value_heads": None, "hidden_size": 3072, "hidden_act": "silu",
            "rms_norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": None, "partial_rotary_factor": 1.0,
        },
        "mllama_text_model": {
            "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096, "hidden_act": "silu",
            "rms_norm_eps": 1e-5, "rope_theta": 5e5,
        },
        "clip_vision_model": {
            "num_attention_heads": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "patch_size": 32,
            "image_size": 224,
        },
        "siglip_vision_model": {
            "num_attention_heads": 12, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "patch_size": 16,
            "image_size": 224,
        },
    }
)  # fmt: skip
"""By model type, what a config of it means where it says nothing."""
