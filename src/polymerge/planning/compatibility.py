"""Check whether a merge is meaningful: contradictory configs, different lineages, averaged routers.

Tensors of equal names and shapes mean something else under another rotary base, other heads or another activation. A
value that one config leaves out is unknown, and contradicts nothing, unless the class that the config names is known to
have a default for it.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from polymerge.families import text_config
from polymerge.families.config import CLASS_DEFAULTS
from polymerge.families.rules import PARTS, without_branch
from polymerge.planning.model import Model

__all__ = ["COMPARED", "config_warnings", "differences", "merged_routers", "other_lineages", "router_globs"]

Config = Mapping[str, Any]


def _plainly(*names: str) -> dict[str, tuple[str, ...]]:
    """Values that every config stores under the same name."""
    return {name: (name,) for name in names}


COMPARED: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "text": {
        # which rows of queries, keys and values make one head: equal products give equal shapes
        "num_attention_heads": ("num_attention_heads", "n_head", "n_heads"),
        "num_key_value_heads": ("num_key_value_heads", "num_multi_query_heads", "multi_query_group_num", "n_kv_heads"),
        "head_dim": ("head_dim", "kv_channels", "attention_head_dim"),
        **_plainly("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
        # what queries and keys are turned by; the members of a scaling are in `_ROPE`
        "rope_theta": ("rope_theta", "rotary_emb_base", "global_rope_theta"),
        "rope_local_base_freq": ("rope_local_base_freq", "local_rope_theta"),
        "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
        **_plainly("rotary_dim", "rope_interleave", "no_rope_layers", "no_rope_layer_interval"),
        **_plainly("position_embedding_type"),
        "alibi": ("alibi", "use_alibi"),
        # what attention sees, and how its scores are made
        **_plainly("sliding_window", "layer_types"),
        "sliding_window_pattern": ("sliding_window_pattern", "_sliding_window_pattern"),
        **_plainly("attention_chunk_size", "query_pre_attn_scalar", "attn_logit_softcapping"),
        **_plainly("final_logit_softcapping", "attn_temperature_tuning", "clip_qkv", "scale_attn_weights"),
        **_plainly("scale_attn_by_inverse_layer_idx"),
        # what each layer computes between its matrices
        "hidden_act": ("hidden_act", "hidden_activation", "activation_function", "activation_type"),
        "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon",
                     "norm_eps"),
        "layer_norm_type": ("layer_norm_type", "norm_type"),
        "attention_bias": ("attention_bias", "qkv_bias", "add_qkv_bias"),
        "mlp_bias": ("mlp_bias", "use_mlp_bias"),
        "qk_norm": ("use_qk_norm", "qk_layernorm", "qk_norm", "attention_layer_norm"),
        **_plainly("norm_after"),
        "parallel_attn": ("parallel_attn", "use_parallel_residual"),
        # numbers that hidden states and scores are multiplied by
        "embedding_multiplier": ("embedding_multiplier", "scale_emb"),
        **_plainly("residual_multiplier", "attention_multiplier"),
        "logits_scaling": ("logits_scaling", "logit_scale"),
        **_plainly("scale_depth", "dim_model_base"),
        # which experts a token goes to, and how their outputs are weighed
        "num_experts_per_tok": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"),
        **_plainly("norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group", "topk_method", "scoring_func"),
    },
    "vision": {
        # an image size says which positions the tower has embeddings for
        **_plainly("patch_size", "image_size"),
        "num_attention_heads": ("num_attention_heads", "num_heads", "attention_heads"),
        "num_channels": ("num_channels", "in_channels", "in_chans"),
        **_plainly("temporal_patch_size", "hidden_act"),
        "norm_eps": ("layer_norm_eps", "rms_norm_eps", "norm_eps"),
        **_plainly("norm_type"),
        "qk_norm": ("use_qk_norm", "qk_normalization"),
        "attention_bias": ("attention_bias", "qkv_bias"),
        # a merge size is also the order of patches; the original LLaVA names its tower, and has no vision_config
        **_plainly("rope_theta", "window_size", "fullatt_block_indexes", "spatial_merge_size", "mm_vision_tower"),
    },
    "projector": {
        # which states of the vision tower come in, and how they are put together
        "vision_feature_layer": ("vision_feature_layer", "mm_vision_select_layer", "select_layer"),
        **_plainly("vision_feature_select_strategy", "mm_vision_select_feature", "deepstack_visual_indexes"),
        # the last of these is the order in which InternVL shuffles pixels
        **_plainly("spatial_merge_size", "downsample_ratio", "scale_factor", "ps_version"),
        **_plainly("mm_tokens_per_image", "mm_patch_merge_type"),
        # what is computed between its matrices
        **_plainly("projector_hidden_act", "mm_projector_type", "cross_attention_layers"),
    },
    "audio": {
        **_plainly("num_mel_bins"),
        "num_attention_heads": ("encoder_attention_heads", "num_attention_heads"),
        **_plainly("activation_function", "max_source_positions", "n_window"),
    },
}  # fmt: skip
"""The config values compared for each part: our name, then every key that configs use for it.

Other values are ignored. Either they do not change what the weights compute: context length, numbers of tokens,
dtypes, caches, dropout and initialisation, versions and paths, image tiling; or the shapes and names of the
tensors show them already: widths, depth, numbers of experts.
"""

_ROPE: Final = (
    "factor", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "mrope_section", "mrope_interleaved",
    "alpha",
)  # fmt: skip
"""Keys of a rotary scaling. `mrope_section` counts only if both configs have it: text uses one position for all
sections.
"""

_NULL: Final = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "attention_chunk_size")
"""Keys for which null means "none" rather than "unspecified"."""

_SAME: Final = {
    "swish": "silu", "mrope": "default", "su": "longrope", "gelu_python": "gelu", "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh", "gelu_tanh": "gelu_pytorch_tanh",
}  # fmt: skip
"""Synonyms in configs."""

_SQUARE: Final = ("patch_size", "image_size")
_NESTED: Final = {"vision": ("vision_config",), "audio": ("audio_config",)}
_NONE: Final = "none"
_ROUTER: Final = re.compile(r".+\.((router|gate|shared_expert_gate)\..+|e_score_correction_bias|expert_bias)")


def differences(ours: Config, theirs: Config, part: str) -> dict[str, tuple[Any, Any]]:
    """The values on which two configs contradict each other, by name, each with both values, for one of `PARTS`."""
    one, other = (dict(_facts(config, part)) for config in (ours, theirs))
    found: dict[str, tuple[Any, Any]] = {}
    for name in one:
        if name not in other or _equal(one[name], other[name]):
            continue
        mine, yours = one[name], other[name]
        if isinstance(mine, list) and isinstance(yours, list) and len(mine) == len(yours):
            place = next(place for place, pair in enumerate(zip(mine, yours, strict=True)) if not _equal(*pair))
            found[f"{name}[{place}]"] = mine[place], yours[place]
        else:
            found[name] = mine, yours
    return found


def config_warnings(
    template: tuple[str, Config], models: Sequence[tuple[str, Config]], parts: Collection[str]
) -> Iterator[str]:
    """A sentence for each part and set of models whose config computes something else than the template's.

    template, models   labels, each with its config.json
    parts              the merged parts
    """
    label, config = template
    for part in (part for part in PARTS if part in parts):
        alike: dict[str, list[str]] = {}
        for name, theirs in models:
            found = differences(config, theirs, part)
            if found:
                said = ", ".join(f"{key}: {_word(one)}/{_word(other)}" for key, (one, other) in found.items())
                alike.setdefault(said, []).append(f"'{name}'")
        for said, labels in alike.items():
            yield (
                f"the configs of template '{label}' and {' and '.join(dict.fromkeys(labels))} differ in what they "
                f"compute with the {part} weights ({said}): the output has the template's config, under which the "
                "others' weights were not trained"
            )


def other_lineages(template: Model, models: Iterable[Model]) -> Iterator[str]:
    """A sentence for each text-tower lineage that differs from the template's."""
    ours = template.tower.model_type
    others: dict[str, list[str]] = defaultdict(list)
    for model in models:
        theirs = model.tower.model_type
        if ours and theirs and ours != theirs:
            others[theirs].append(f"'{model.label}'")
    for kind, labels in others.items():
        yield (
            f"the text tower of template '{template.label}' is a {ours}, that of {' and of '.join(labels)} a {kind}: "
            "their tensors have the same names, but a merge only means something if they come from one base"
        )


def merged_routers(merged: Iterable[str], names: Collection[str] | None = None) -> Iterator[str]:
    """A sentence with globs for merged expert routers, if any; `merged` and `names` as for `router_globs`."""
    if found := router_globs(merged, names):
        yield (
            f"the routers of experts are merged ({sum(found.values())} tensors): one that is averaged sends tokens to "
            f"other experts than those trained for them. To keep the template's, say exclude: {json.dumps(list(found))}"
        )


def router_globs(merged: Iterable[str], names: Collection[str] | None = None) -> dict[str, int]:
    """Globs for the routers of experts that are merged, with the number of tensors of each.

    merged   canonical names of what is merged
    names    all canonical names of the template, where they are known: a gate is a router if experts are beside it
    """
    beside = None if names is None else {name.partition(".experts.")[0] for name in names if ".experts." in name}
    found: dict[str, int] = defaultdict(int)
    for name in sorted(merged):
        plain = without_branch(name)
        module, gate, _ = plain.partition(".gate.")
        doubtful = gate and ".router" not in module and beside is not None and module not in beside
        if _ROUTER.fullmatch(plain) and not doubtful:
            found[re.sub(r"(?<=\.)[0-9]+(?=\.)", "*", plain)] += 1
    return dict(found)


def _facts(config: Config, part: str) -> Iterator[tuple[str, Any]]:
    """The values of a part by the names of `COMPARED`, with class defaults for those the config leaves out."""
    levels = _levels(config, part)
    kind = levels[0].get("model_type") if levels else None
    defaults = CLASS_DEFAULTS.get(str(kind), {})
    found: dict[str, Any] = {}
    for name, spellings in COMPARED[part].items():
        for level in (*levels, defaults):
            said = [key for key in spellings if key in level and (level[key] is not None or name in _NULL)]
            if said:
                found[name] = level[said[0]]
                break
    if part == "text" and levels:
        text = levels[0]
        found |= _heads(found, text.get("hidden_size") or defaults.get("hidden_size"))
        found |= _rope(text)
        if str(kind).startswith("gemma"):
            # its first configs say `gelu` under the older key, and mean the approximation
            older = text.get("hidden_act", "gelu")
            found["hidden_act"] = text.get("hidden_activation") or ("gelu_pytorch_tanh" if older == "gelu" else older)
        _windows(found, text.get("use_sliding_window", defaults.get("use_sliding_window")))
    elif levels:
        found |= {name: value for name, value in _rope(levels[0]).items() if name == "rope_theta"}
    yield from ((name, _plain(name, value)) for name, value in found.items())


def _levels(config: Config, part: str) -> list[Config]:
    """The levels of a config that describe a part, highest precedence first."""
    if part == "text":
        return [text_config(config)]
    outer = [inner for key in ("thinker_config",) if isinstance(inner := config.get(key), Mapping)]
    outer.append(config)
    nested = [inner for level in outer for key in _NESTED.get(part, ()) if isinstance(inner := level.get(key), Mapping)]
    if part == "projector":
        nested = [inner for level in outer if isinstance(inner := level.get("vision_config"), Mapping)]
        return [*outer, *nested, text_config(config)]
    if part == "vision" and not nested:
        return [{key: config[key] for key in ("mm_vision_tower",) if key in config}]
    return nested


def _heads(found: Config, width: Any) -> dict[str, Any]:
    """Head counts that follow from other values if the config leaves them out."""
    heads, more = found.get("num_attention_heads"), dict[str, Any]()
    if not isinstance(heads, int) or heads <= 0:
        return more
    if "num_key_value_heads" not in found:
        more["num_key_value_heads"] = heads
    if "head_dim" not in found and isinstance(width, int):
        more["head_dim"] = width // heads
    return more


def _rope(text: Config) -> dict[str, Any]:
    """Rotary settings from the keys of transformers 4 and of 5, which nests them, in some families by layer type."""
    new, old = text.get("rope_parameters"), text.get("rope_scaling")
    said = new if isinstance(new, Mapping) else old if isinstance(old, Mapping) else {}
    kinds = {name: inner for name, inner in said.items() if isinstance(inner, Mapping)}
    found: dict[str, Any] = {}
    for kind, inner in (kinds or {"": said}).items():
        own = {"rope_type": inner.get("rope_type", inner.get("type", "default"))}
        if own["rope_type"] == "dynamic" and inner.get("alpha") is None:
            # it turns as the default does up to max_position_embeddings: only how long a context may be differs
            own, inner = {"rope_type": "default"}, {key: inner[key] for key in inner if key != "factor"}
        own |= {key: inner[key] for key in ("rope_theta", "partial_rotary_factor") if inner.get(key) is not None}
        own |= {f"rope_scaling.{key}": inner[key] for key in _ROPE if inner.get(key) is not None}
        if kind == "sliding_attention":
            found |= {"rope_local_base_freq": own["rope_theta"]} if "rope_theta" in own else {}
        elif kind in ("", "full_attention"):
            found |= own
        else:
            found |= {f"{key} ({kind})": value for key, value in own.items()}
    return found


def _windows(found: dict[str, Any], used: Any) -> None:
    """Drop the sliding window if the layers do not use it."""
    types = found.get("layer_types")
    layers = types if isinstance(types, list) else []
    if used is False or (layers and all(kind == "full_attention" for kind in layers)):
        found["sliding_window"] = None
    if layers and found.get("sliding_window", 0) is None:
        found["layer_types"] = ["full_attention" if kind == "sliding_attention" else kind for kind in layers]


def _plain(name: str, value: Any) -> Any:
    """Normalise a value for comparison."""
    if value is None or (name == "sliding_window" and value == 0):
        return _NONE
    if isinstance(value, int) and abs(value) > 1 << 53:
        return str(value)  # which no float can be compared with
    if isinstance(value, str):
        return _SAME.get(value, value.rstrip("/").rpartition("/")[2] if name == "mm_vision_tower" else value)
    if isinstance(value, list | tuple):
        items = [_plain("", item) for item in value]
        return items[0] if len(items) == 1 or (name in _SQUARE and len(set(map(repr, items))) == 1) else items
    return value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-9)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def _word(value: Any) -> str:
    """Format a value in a few characters."""
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_word, value[:4]))}{', ...' if len(value) > 4 else ''}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
