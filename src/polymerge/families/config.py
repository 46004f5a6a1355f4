"""What a config.json says about the text tower and how the weights are stored.

transformers leaves values that equal a class's default out of nested configs (the config of LLaVA 1.5 does not say how
many layers there are), and its versions nest differently; both are settled here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from polymerge.reads import Ranges

__all__ = ["TextTower", "quantization_method", "splits", "text_config", "text_tower"]

Config = Mapping[str, object]

TEXT_MODEL_TYPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "llava": "llama",
        "llava_next": "llama",
        "llava_next_video": "llama",
        "llava_onevision": "qwen2",
        "idefics2": "mistral",
        "idefics3": "llama",
        "smolvlm": "llama",
        "qwen2_vl": "qwen2",
        "qwen2_vl_text": "qwen2",
        "qwen2_5_vl": "qwen2",
        "qwen2_5_vl_text": "qwen2",
        "internvl": "qwen2",
        "llava_llama": "llama",
        "llava_mistral": "mistral",
        "llava_qwen": "qwen2",
        "share4v": "llama",
        "mplug_owl2": "llama",
        "minicpmv": "",
    }
)
"""The decoder lineage that a model type stands for where the config does not name a plain one."""

DECODERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "LlavaLlamaForCausalLM": "llama",
        "LlavaMistralForCausalLM": "mistral",
        "LlavaQwenForCausalLM": "qwen2",
        "CogVLMForCausalLM": "llama",
        "CambrianLlamaForCausalLM": "llama",
    }
)
"""The lineage that an architecture stands for whose config has a model type of many decoders, or none."""

DEFAULTS: Final[Mapping[str, Mapping[str, int]]] = MappingProxyType(
    {
        "llama": {"num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 32000},
        "mistral": {"num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 32000},
        "qwen2": {"num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 151936},
    }
)
"""What a nested config means when it leaves a size out: the defaults of the decoder's config class."""


@dataclass(frozen=True)
class TextTower:
    """The text tower as the config describes it; None is what the config does not say.

    model_type   the decoder's lineage, such as `qwen2`: towers of one lineage can be joined
    ties_head    whether the head is the embedding; where it is None, a head that is not stored is tied
    """

    model_type: str | None
    layers: int | None
    hidden_size: int | None
    vocab_size: int | None
    ties_head: bool | None


def text_config(config: Config) -> Config:
    """The part of a config that describes the text tower: `text_config`, `llm_config`, or all of a flat config."""
    for key in ("text_config", "llm_config"):
        nested = config.get(key)
        if isinstance(nested, Mapping):
            return nested
    return config


def text_tower(config: Config) -> TextTower:
    """Describe the text tower that a config asks for."""
    text = text_config(config)
    model_type = _model_type(config)
    # Only a nested config leaves out what its class implies; a flat one says everything that is known.
    implied = DEFAULTS.get(model_type or "", {}) if text is not config else {}

    def size(key: str) -> int | None:
        value = text.get(key, implied.get(key))
        return value if isinstance(value, int) else None

    return TextTower(model_type, size("num_hidden_layers"), size("hidden_size"), size("vocab_size"), _ties_head(config))


def _model_type(config: Config) -> str | None:
    """The lineage of the decoder."""
    architectures = config.get("architectures")
    for name in architectures if isinstance(architectures, list) else ():
        if name in DECODERS:
            return DECODERS[name]
    outer, inner = config.get("model_type"), text_config(config).get("model_type")
    named = inner if isinstance(inner, str) else outer
    return (TEXT_MODEL_TYPES.get(named, named) or None) if isinstance(named, str) else None


def _ties_head(config: Config) -> bool | None:
    """Whether the head is tied, from the outer and the nested flag.

    transformers 4 goes by the nested flag and does not write an outer one that is true, since that is its default;
    5 goes by the outer flag and takes over a nested one that is true. So one true is enough, whoever wrote it.
    """
    stated = [part.get("tie_word_embeddings") for part in (config, text_config(config))]
    flags = [flag for flag in stated if isinstance(flag, bool)]
    return any(flags) if flags else None


def splits(config: Config) -> dict[str, tuple[Ranges, ...]]:
    """The rows of each tensor in those that a decoder of this config may hold fused.

    qkv   queries, keys and values one below the other, the last two with fewer heads where queries share them
    """
    text = text_config(config)

    def number(*keys: str) -> int | None:
        return next((value for key in keys if isinstance(value := text.get(key), int)), None)

    heads = number("num_attention_heads")
    shared = number("num_key_value_heads", "num_multi_query_heads") or heads
    width = number("head_dim") or ((number("hidden_size") or 0) // heads if heads else 0)
    if not heads or not shared or not width:
        return {}
    q, kv = heads * width, shared * width
    return {"qkv": (((0, q),), ((q, q + kv),), ((q + kv, q + 2 * kv),))}


def quantization_method(config: Config) -> str | None:
    """How the stored weights are quantized, such as `bitsandbytes`, or None if they are plain numbers."""
    for part in (config, text_config(config)):
        for key in ("quantization_config", "compression_config"):
            settings = part.get(key)
            if isinstance(settings, Mapping) and settings:
                method = settings.get("quant_method")
                return method if isinstance(method, str) else "unknown"
    return None
