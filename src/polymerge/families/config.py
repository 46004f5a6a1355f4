"""What a config.json says about the text tower and how the weights are stored.

transformers leaves values that equal a class's default out of nested configs (the config of LLaVA 1.5 does not say how
many layers there are), and its versions nest differently; both are settled here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from polymerge.dtypes import dtype_code
from polymerge.families.registry import FAMILIES, claimed
from polymerge.families.resolve import Split, Stack
from polymerge.families.rules import Family, Rule

__all__ = [
    "CLASS_DEFAULTS",
    "CONFIG_DTYPES",
    "QUANTIZATION",
    "TextTower",
    "config_dtype",
    "family_of",
    "splits",
    "text_config",
    "text_tower",
    "untied",
    "with_rows",
]

Config = Mapping[str, object]

NESTED = ("thinker_config", "text_config", "llm_config", "language_config")
"""The keys under which configs describe the text tower; the first may hold another one."""

CONFIG_DTYPES = ("dtype", "torch_dtype")
"""The keys of the dtype that a model is loaded in, in transformers 5 and 4."""

QUANTIZATION = "quantization_config"
"""The key under which a config says how weights are packed; a dtype in it is not that of the model."""

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
"""By model type, what transformers' config class has for a value that config.json leaves out.

transformers 4 leaves what equals a class's default out of nested configs. Only values that its versions agree on, and
only those that say how weights are used: sizes are in the tables of the families.
"""


@dataclass(frozen=True)
class TextTower:
    """The text tower as the config describes it; None for what it does not say.

    model_type   the decoder's lineage, such as `qwen2`: towers of one lineage can be joined
    ties_head    whether a head that is not stored is the embedding; None where nothing says that it is not
    """

    model_type: str | None
    layers: int | None
    hidden_size: int | None
    vocab_size: int | None
    ties_head: bool | None


def text_config(config: Config) -> Config:
    """The part of a config that describes the text tower: one of `NESTED`, or all of a flat config."""
    nested = _nested(config)
    return config if nested is None else text_config(nested)


def with_rows(config: Config, before: int, after: int) -> dict[str, object]:
    """The config of a model whose embedding has `after` rows and had `before`.

    Every level with a vocabulary size is changed by the same number, since some classes have rows beyond it; one that
    has the new size already stays, and the innermost level gets one in any case.
    """
    changed, said = dict(config), config.get("vocab_size")
    inside = next((key for key in NESTED if isinstance(config.get(key), Mapping)), None)
    if type(said) is int and said != after:
        changed["vocab_size"] = said + after - before
    if inside is not None:
        nested = config[inside]
        assert isinstance(nested, Mapping)
        if _nested(nested) is None and "vocab_size" not in nested:
            nested = {**nested, "vocab_size": _said(config, "vocab_size", claimed(config)) or before}
        changed[inside] = with_rows(nested, before, after)
    elif "vocab_size" not in config:
        changed["vocab_size"] = after
    return changed


def _nested(config: Config) -> Config | None:
    """The nested config that leads to the text tower's, or None."""
    return next((inside for key in NESTED if isinstance(inside := config.get(key), Mapping)), None)


def text_tower(config: Config, family: Family | None = None) -> TextTower:
    """Describe the text tower that a config asks for, as one of `family`, or of the family that the config names."""
    family = family if family is not None and family.decoders else claimed(config)
    layers = _said(config, "num_hidden_layers", family)
    return TextTower(
        _lineage(config, family),
        None if layers is None else layers - len(_between(config, family)),
        _said(config, "hidden_size", family),
        _said(config, "vocab_size", family),
        _ties_head(config, family),
    )


def family_of(config: Config, name: str | None = None) -> Family:
    """The family whose names a checkpoint has, by its config.json alone, or by the family's `name`.

    Where there are layers between those of the plain decoder, its rules number the two kinds separately: layer 4 of
    such a tower is layer 3 of the language model that it was made of, if its own layer 3 looks at the image.
    """
    family = claimed(config) if name is None else FAMILIES[name]
    between = _between(config, family)
    if not between:
        return family
    rules: list[Rule] = []
    for rule in family.rules:
        if rule.canonical == _LAYERS:
            rules += [replace(rule, without=between), replace(rule, canonical=_BETWEEN, only=between)]
        elif rule.names[0].startswith("text.layers.{i}."):
            rules.append(replace(rule, without=between))
        else:
            rules.append(rule)
    return replace(family, rules=tuple(rules))


_LAYERS, _BETWEEN = "text.layers.{i}.{rest}", "projector.cross_layers.{i}.{rest}"


def _between(config: Config, family: Family) -> tuple[int, ...]:
    """The layers between those of the plain decoder, in order."""
    listed = text_config(config).get(family.interleaved, family.defaults.get(family.interleaved, ()))
    numbers = listed if isinstance(listed, list | tuple) else ()
    return tuple(sorted({number for number in numbers if type(number) is int}))


def _said(config: Config, key: str, family: Family) -> int | None:
    """A size that a config says or implies: only a nested config leaves out its class's default."""
    text = text_config(config)
    value = text.get(key)
    if value is None and text is not config:
        plain = FAMILIES.get(_lineage(config, family) or "")
        implied = {**(plain.defaults if plain else {}), **family.defaults}
        value = implied.get(key)
    return value if type(value) is int and value > 0 else None


def _lineage(config: Config, family: Family) -> str | None:
    """The lineage of the decoder: the name of the language model's family, where there is one."""
    inner = text_config(config).get("model_type")
    architectures = config.get("architectures")
    said = config.get("model_type") if inner is None else inner
    for name in (*(architectures if isinstance(architectures, list) else ()), said):
        if isinstance(name, str) and name in family.lineages:
            return family.lineages[name] or None
    if isinstance(inner, str):
        named = claimed({"model_type": inner})
        if named.decoders:
            return named.decoders[0]
        if not inner.startswith(family.name):  # `qwen2_vl_text` is what the family calls its own decoder
            return inner
    return family.decoders[0] if family.decoders else None


def _ties_head(config: Config, family: Family) -> bool | None:
    """Return whether the head is tied, from the outer and the nested flags.

    transformers 4 goes by the nested flag and does not write an outer one that is true, since that is its default;
    5 goes by the outer flag, and takes over a nested one that is true in some families and not in others. So one true
    is enough, whoever wrote it, unless an outer one says otherwise. A config that is silent means what its class does.
    A head that is stored is a head all the same: transformers 5 ties the two only where they are equal.
    """
    levels = [config]
    while (inside := _nested(levels[-1])) is not None:
        levels.append(inside)
    *outer, inner = (level.get("tie_word_embeddings") for level in levels)
    if inner is True and False in outer:
        return None
    flags = [flag for flag in (*outer, inner) if isinstance(flag, bool)]
    return any(flags) if flags else (family.ties or None)


def untied(config: Config) -> dict[str, object]:
    """A config that says, wherever it describes a text tower, that the head is not the embedding."""
    nested = {key: untied(inside) for key in NESTED if isinstance(inside := config.get(key), Mapping)}
    return {**config, **nested, "tie_word_embeddings": False}


def splits(config: Config) -> dict[str, Split]:
    """The rows of each tensor in the fused ones that a decoder of this config may have.

    qkv      queries, keys and values one below the other, the last two with fewer heads where queries share them
    wqkv     the same, but each head of keys with the queries that share it before it and its values after it
    gate_up  gate and up, each as high as the MLP is wide
    halves   the same where the config counts both as the MLP's width
    experts_in, experts_out   all experts of a layer, what they read and what they write
    """
    text = text_config(config)

    def number(*keys: str) -> int:
        return next((value for key in keys if type(value := text.get(key)) is int and value > 0), 0)

    found: dict[str, Split] = {}
    heads = number("num_attention_heads")
    shared = number("num_key_value_heads", "num_multi_query_heads") or heads
    width = number("head_dim") or (number("hidden_size") // heads if heads else 0)
    if heads and width:
        q, kv = heads * width, shared * width
        found["qkv"] = (((0, q),), ((q, q + kv),), ((q + kv, q + 2 * kv),))
    if heads and width and heads % shared == 0:
        share = heads // shared
        edges = [(group * (share + 2) * width, share * width) for group in range(shared)]
        found["wqkv"] = (
            tuple((start, start + height) for start, height in edges),
            tuple((start + height, start + height + width) for start, height in edges),
            tuple((start + height + width, start + height + 2 * width) for start, height in edges),
        )
    inner = number("intermediate_size")
    if inner:
        found["gate_up"] = (((0, inner),), ((inner, 2 * inner),))
        found["halves"] = (((0, inner // 2),), ((inner // 2, inner),))
    hidden = _said(config, "hidden_size", claimed(config))
    if hidden:
        experts = number("num_experts", "num_local_experts") or None
        found["experts_in"], found["experts_out"] = Stack(experts, columns=hidden), Stack(experts, rows=hidden)
    return found


def config_dtype(config: Config) -> str | None:
    """The dtype that a config has its model loaded in, by its safetensors name; None where it says none.

    The one at the top counts for all of the model, as in transformers; without it, the first of its parts'.
    """
    named = [value for key in CONFIG_DTYPES if isinstance(value := config.get(key), str)]
    found = [code for name in named if (code := dtype_code(name.removeprefix("torch."))) is not None]
    parts = (part for key, part in config.items() if isinstance(part, Mapping) and key != QUANTIZATION)
    return found[0] if found else next(filter(None, map(config_dtype, parts)), None)
