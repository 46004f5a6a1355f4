"""Tiny configs and checkpoints of any model type that transformers can build, by shrinking its default config.

    config = tiny_config("glm4v")
    folder = build(config, tmp_path / "vlm", seed=0)

Sizes are shrunk consistently: one key has one value wherever it stands in a part of the config, so that what one module
gives another takes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

warnings.filterwarnings("ignore", module="transformers")

WIDTH, HEADS, HEAD, INNER, LAYERS, ROWS = 32, 4, 8, 48, 2, 320

_LAYERS = ("num_hidden_layers", "depth", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
           "num_encoder_layers", "num_decoder_layers", "layers")  # fmt: skip
_WIDTHS = ("hidden_size", "d_model", "n_embd", "embed_dim", "out_hidden_size", "projection_dim", "text_hidden_size",
           "dim", "output_dim", "vision_output_dim", "embedding_dim", "projector_hidden_size", "cross_hidden_size",
           "encoder_hidden_size", "hidden_dim", "audio_hidden_size", "adapter_in_dim", "adapter_input_size",
           "word_embed_proj_dim")  # fmt: skip
_INNER = ("d_ff", "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner",
          "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp", "block_ff_dim",
          "ffn_hidden_size", "moe_shared_expert_intermediate_size", "vision_intermediate_size")  # fmt: skip
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "attention_heads",
          "decoder_attention_heads")  # fmt: skip
_KEYS = ("num_key_value_heads", "num_kv_heads")
_HEAD = ("d_kv", "head_dim", "attention_head_dim", "global_head_dim", "kv_channels", "v_head_dim")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk", "experts_top_k")
"""Keys of configs by what they are the size of."""
_FIXED = {
    "n_group": 1, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "qk_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "max_position_embeddings": 512, "image_size": 32, "patch_size": 8,
    "vocab_size": ROWS, "vocab_size_per_layer_input": ROWS, "hidden_size_per_layer_input": 8,
    "first_k_dense_replace": 1, "num_mel_bins": 8, "max_source_positions": 20, "base_channels": 32,
    "num_embeddings": 64, "codebook_size": 64, "num_filters": 4, "upsample_groups": WIDTH, "sliding_window": 8,
}  # fmt: skip
"""By key, the value that it gets where a default config has a number."""
_LISTED = {"mrope_section": [1, 1, 2], "vision_feature_layer": [1, 0], "deepstack_visual_indexes": [0, 1]}
"""By key, the list that it gets where a default config has one."""

_TOWERS = {"gemma4": {"vision_config": "gemma4_vision", "audio_config": "gemma4_audio"},
           "diffusion_gemma": {"vision_config": "gemma4_vision"}}  # fmt: skip
"""By model type, the towers that its default config has none of, each with its model type."""
_EXPERTS_TOO = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": INNER}
_MROPE = {"text_config": {"rope_parameters": {"mrope_section": [1, 1, 2]}}}
_MROPE_AND_START = {**_MROPE, "vision_start_token_id": 7}
_THREE_MERGERS = {"vision_config": {"depth": 3, "deepstack_visual_indexes": [0, 1, 2]}}  # as published ones have
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_NEEDED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("ernie4_5_vl_moe", "glm46v", "glm4v", "glm_ocr", "glmga", "hunyuan_vl", "paddleocr_vl",
                     "qwen2_5_vl", "qwen2_vl"), _MROPE),
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), _MROPE_AND_START),
    "glm4v_moe": {"text_config": {"rope_parameters": {"mrope_section": [1, 1, 0]}}},
    "blip-2": {"image_token_index": 7},
    "instructblip": {"image_token_index": 7},
    "instructblipvideo": {"video_token_index": 7},
    "chameleon": {"vocabulary_map": {"<image>": 5, "IMGIMGBSZ": 6}},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 5, "<|image token|>": 6, "<|visual token 000000|>": 7}},
    "diffusion_gemma": {"text_config": _EXPERTS_TOO},
    "dots3_note": {"vision_config": {"adapter_out_dim": WIDTH}, "audio_config": {"adapter_out_dim": WIDTH},
                   "text_config": {"per_layer_config": {"1": {
                       "head_dim": 2 * HEAD, "qk_rope_head_dim": HEAD, "v_head_dim": HEAD, "q_lora_rank": 16}}}},
    "hunyuan_vl": {"text_config": {"head_dim": HEAD, "rope_parameters": {"mrope_section": [1, 1, 1, 1]}}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": WIDTH // 4}},
    "cohere_compass": {"text_config": {"rope_parameters": {
        "full_attention": None, "sliding_attention": {**_ROPE, "mrope_section": [1, 1, 2]}}}},
    "granite4_vision": {"vision_config": {"hidden_size": 64}, "downsample_rate": "1/2",
                        "deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [0, 0, 1, 1]},
    "mistral4": {"rope_parameters": {"partial_rotary_factor": 1.0}},
    "moonshine_streaming": {"num_key_value_heads": HEADS, "num_attention_heads": HEADS},
    "qwen2_5_omni": {"token2wav_config": {
        "dit_config": {"emb_dim": 8, "mel_dim": 8, "enc_emb_dim": 8, "enc_dim": 8, "enc_channels": [8, 8, 8, 8, 24],
                       "enc_attention_channels": 4, "num_embeds": 9, "enc_se_channels": 4, "look_ahead_layers": [0],
                       "look_backward_layers": [0]},
        "bigvgan_config": {"mel_dim": 8, "upsample_initial_channel": 16, "upsample_rates": [2],
                           "upsample_kernel_sizes": [4], "resblock_kernel_sizes": [3],
                           "resblock_dilation_sizes": [[1, 3, 5]]}}},
    "qwen3_omni_moe": {"talker_config": {"spatial_merge_size": 2,
                                         "text_config": {"shared_expert_intermediate_size": INNER}}},
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), _THREE_MERGERS),
    "qwen4_exp": {"text_config": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD,
                                  "indexer_budget": 8, "indexer_compress_ratio": 4}},
    "step3p7": {"text_config": {"sliding_window": 8}},
}  # fmt: skip
"""By model type, what its default config lacks for its class to be built, or what does not fit when it is small."""


def multimodal_types() -> dict[str, str]:
    """The model types that transformers has a class for images, for sound or for both of, each with the class."""
    found: dict[str, str] = {}
    for mapping in ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
                    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"):  # fmt: skip
        for kind, names in getattr(modeling_auto, mapping, {}).items():
            found.setdefault(kind, names if isinstance(names, str) else names[0])
    return dict(sorted(found.items()))


def text_types() -> dict[str, str]:
    """The model types that transformers has a class of text alone of, each with the class."""
    found = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return {kind: name for kind, name in sorted(found.items()) if kind not in multimodal_types()}


def tiny_config(kind: str, *, text: str | None = None) -> Any:
    """The default config of a model type with all sizes shrunk; `text` is the model type of another text tower."""
    found = _shrunk(transformers.CONFIG_MAPPING[kind]().to_dict())
    for part, inner in (_TOWERS.get(kind, {}) | ({"text_config": text} if text else {})).items():
        found[part] = _shrunk(transformers.CONFIG_MAPPING[inner]().to_dict())
    return transformers.CONFIG_MAPPING[kind].from_dict(_with(found, _NEEDED.get(kind, {})))


def text_partner(config: Any) -> Any | None:
    """The config of the language model alone, if transformers has a class for the text config of a multimodal one."""
    text = config.get_text_config()
    alone = type(text) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not text.is_encoder_decoder
    return copy.deepcopy(text) if text is not config and alone else None


def build(config: Any, folder: Path, *, seed: int = 0, class_name: str | None = None) -> Path:
    """Write a checkpoint of a config with random weights."""
    named = class_of(config, class_name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = named(copy.deepcopy(config))
    filled(model, seed)
    model.save_pretrained(folder)
    if config.model_type == "qwen2_5_omni":  # it asks for its voices before it loads
        torch.save({"Chelsie": {"bos_token": 1, "cond": torch.zeros(1, 8)}}, folder / "spk_dict.pt")
    return folder


def class_of(config: Any, name: str | None = None) -> Any:
    """The class of that name, or else that of a language model of that config."""
    return getattr(transformers, name) if name else transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def filled(model: Any, seed: int) -> None:
    """Draw every parameter, so that no two tensors are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            center = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(torch.empty(parameter.shape).normal_(center, 0.1, generator=generator))
        for buffer in model.buffers():
            if buffer.dtype.is_floating_point and torch.isinf(buffer).all():  # bounds that are not set
                buffer.copy_(torch.sign(buffer) * 4)


def _shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """A config with small sizes at every level; lists with one value per layer are cut to as many."""
    found: dict[str, Any] = {}
    before = next((config[key] for key in _LAYERS if isinstance(config.get(key), int)), 0)
    heads = [config.get(key) for key in ("num_attention_heads", "num_key_value_heads")]
    for key, value in ((str(key), value) for key, value in config.items()):
        if key in _LISTED and isinstance(value, list):
            found[key] = _LISTED[key]
        elif key == "num_key_value_heads" and heads[0] == heads[1]:
            found[key] = HEADS
        elif key == "per_layer_config" and value:
            found[key] = {"1": _shrunk(next(iter(value.values())))}
        elif isinstance(value, dict):
            found[key] = _shrunk(value)
        elif isinstance(value, bool) or value is None:
            found[key] = value
        elif isinstance(value, int):
            found[key] = _size(key, value)
        elif isinstance(value, list) and before and len(value) == before:
            found[key] = _cut(value)
        else:
            found[key] = [1] * len(value) if key == "depths" else value
    return found


def _with(config: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """A config with some of its values replaced, at any depth."""
    inner = {key: _with(config[key], one) for key, one in more.items()
             if isinstance(one, dict) and isinstance(config.get(key), dict)}  # fmt: skip
    return {**config, **more, **inner}


def _cut(values: list[Any]) -> list[Any]:
    """As many values as there are layers, of as many kinds as there are."""
    kinds = [value for place, value in enumerate(values) if value not in values[:place]]
    return (kinds + values)[:LAYERS] if len(kinds) > 1 else values[:LAYERS]


def _size(key: str, value: int) -> int:
    table: Iterator[tuple[tuple[str, ...], int]] = iter((
        (_LAYERS, LAYERS), (_WIDTHS, WIDTH), (_INNER, INNER), (_HEADS, HEADS), (_KEYS, 2), (_HEAD, HEAD),
        (_EXPERTS, 4), (_TOP, 2),
    ))  # fmt: skip
    for keys, size in table:
        if key in keys:
            return min(size, value) if value > 0 else value
    if key in _FIXED:
        return min(_FIXED[key], value) if value > 0 else value
    if key.endswith("token_id") or key.endswith("token_index"):
        return value % ROWS if value >= 0 else value
    return value
