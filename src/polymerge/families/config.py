"""What a config.json tells about the text tower and the storage of weights.

transformers leaves values that equal a class's default out of nested configs (the config of LLaVA 1.5 does not say how
many layers there are), and its versions nest differently; both are settled here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from polymerge.checkpoints.bounds import EXPERTS, HEADS
from polymerge.checkpoints.files import class_names
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
_MOST: Final = 2**40  # of a size; a number above is none of a model

NESTED = ("thinker_config", "text_config", "llm_config", "language_config")
"""The keys of configs for the text tower; the first may contain another one."""

CONFIG_DTYPES = ("dtype", "torch_dtype")
"""The keys of the loading dtype in transformers 5 and 4."""

QUANTIZATION = "quantization_config"
"""The config key of quantization settings; a dtype inside it is not the model's."""

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
"""By model type, the defaults of transformers' config class for values missing from config.json.

transformers 4 omits values that equal a class's default from nested configs. Only values that all versions share, and
only those that say how weights are used: sizes are in the tables of the families.
"""


@dataclass(frozen=True)
class TextTower:
    """The text tower as described by the config; None for unspecified values.

    model_type   the decoder's lineage, such as `qwen2`: towers of one lineage can be joined
    ties_head    whether a head that is not stored is the embedding; None if unspecified
    """

    model_type: str | None
    layers: int | None
    hidden_size: int | None
    vocab_size: int | None
    ties_head: bool | None


def text_config(config: Config) -> Config:
    """The part of a config that describes the text tower: one of `NESTED`, or the entire config if it is flat."""
    nested = _nested(config)
    return config if nested is None else text_config(nested)


def with_rows(config: Config, before: int, after: int) -> dict[str, object]:
    """The config of a model whose embedding grew or shrank from `before` to `after` rows.

    Every level's vocabulary size is changed by the same number, since some classes have rows beyond it; a level that
    already has the new size is kept, and the innermost level always gets one.
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
    """Describe the text tower of a config, read as one of `family`, or of the family that the config names."""
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
    """The family whose names a checkpoint has, from its config.json alone, or from the family's `name`.

    If there are layers between those of the plain decoder, its rules number the two kinds separately: layer 4 of
    such a tower is layer 3 of the original language model if its own layer 3 attends to the image.
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
    """A size that a config states or implies: only nested configs omit their class's default."""
    text = text_config(config)
    value = text.get(key)
    if value is None and text is not config:
        plain = FAMILIES.get(_lineage(config, family) or "")
        implied = {**(plain.defaults if plain else {}), **family.defaults}
        value = implied.get(key)
    return value if type(value) is int and 0 < value <= _MOST else None


def _lineage(config: Config, family: Family) -> str | None:
    """The lineage of the decoder: the language model's family name, if there is one."""
    inner = text_config(config).get("model_type")
    said = config.get("model_type") if inner is None else inner
    for name in (*class_names(config), said):
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
    is enough, in either version, unless an outer one is false. Without any flag the class's default applies.
    A stored head is independent regardless: transformers 5 ties the two only if they are equal.
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
    """A config that marks the head as untied at every level that describes a text tower."""
    nested = {key: untied(inside) for key in NESTED if isinstance(inside := config.get(key), Mapping)}
    return {**config, **nested, "tie_word_embeddings": False}


def splits(config: Config, family: Family | None = None) -> dict[str, Split]:
    """The row ranges of each tensor in the fused ones that a decoder of this config may have.

    qkv      queries, keys and values one below the other, the last two with fewer heads where queries share them
    wqkv     the same, but each head of keys with the queries that share it before it and its values after it
    gate_up  gate and up, each as high as the MLP is wide
    halves   the same where the config counts both as the MLP's width
    experts_in, experts_out   all experts of a layer, their input and output projections

    family   whose defaults hold for sizes that the config leaves out; that which the config names by default
    """
    text = text_config(config)

    def number(*keys: str, most: int = _MOST) -> int:
        return next((value for key in keys if type(value := text.get(key)) is int and 0 < value <= most), 0)

    found: dict[str, Split] = {}
    heads = number("num_attention_heads", most=HEADS)
    shared = number("num_key_value_heads", "num_multi_query_heads", most=HEADS) or heads
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
    hidden = _said(config, "hidden_size", family or claimed(config))
    if hidden:
        experts = number("num_experts", "num_local_experts", most=EXPERTS) or None
        found["experts_in"], found["experts_out"] = Stack(experts, columns=hidden), Stack(experts, rows=hidden)
    return found


def config_dtype(config: Config) -> str | None:
    """The dtype that a config has its model loaded in, by its safetensors name; None if unspecified.

    The top-level one applies to the entire model, as in transformers; without it, the first of its parts'.
    """
    named = [value for key in CONFIG_DTYPES if isinstance(value := config.get(key), str)]
    found = [code for name in named if (code := dtype_code(name.removeprefix("torch."))) is not None]
    parts = (part for key, part in config.items() if isinstance(part, Mapping) and key != QUANTIZATION)
    return found[0] if found else next(filter(None, map(config_dtype, parts)), None)
