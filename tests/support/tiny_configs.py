"""The sizes, vocabularies and configs of the tiny checkpoints that `tiny.py` builds."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

LLMS = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi3", "mixtral",
        "internlm2")  # fmt: skip

TEXT = {"llava": "llama", "llava_next": "llama", "llava_onevision": "qwen2", "idefics2": "mistral",
        "qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2", "internvl": "qwen2", "internvl_chat": "llama",
        "idefics3": "llama", "qwen3_vl": "qwen3", "qwen3_vl_moe": "qwen3_moe", "gemma3": "gemma3_text",
        "paligemma": "gemma", "mistral3": "mistral", "mllama": "llama", "qwen2_audio": "qwen2",
        "qwen2_5_omni": "qwen2", "deepseek_vl": "llama", "llava_original": "qwen2", "mplug_owl2": "llama",
        "cogvlm": "llama", "minicpm_v": "qwen2", "cambrian": "llama", "phi3_v": "phi3",
        "deepseek_vl_original": "llama", "molmo": "qwen2"}  # fmt: skip
"""The decoder that each multimodal family has when none is asked for."""

VLMS = tuple(TEXT)

CLASSLESS = ("internvl_chat", "llava_original", "mplug_owl2", "cogvlm", "minicpm_v", "cambrian", "phi3_v",
             "deepseek_vl_original", "molmo", "internlm2")  # fmt: skip
"""The families that transformers has no class of: `tiny_classless` has their tensors, and nothing can run them."""

RUNNABLE = tuple(family for family in (*VLMS, *LLMS) if family not in CLASSLESS)
"""All others: transformers builds, loads and runs them."""

WITH_PROCESSOR = ("llava", "llava_next", "idefics2")
"""The families whose processor works without torchvision; the others get the settings of their image processor."""

MODEL_TYPES = {"qwen2_5_omni": "qwen2_5_omni_thinker"}
"""What transformers calls a family in its configs, if not by its name."""

WORDS = (
    "<pad>", "<s>", "</s>", "<unk>", *"0123456789", *"abcdefghijklmnopqrstuvwxyz?.,+-*=",
    "what", "is", "the", "sum", "of", "red", "blue", "green", "one",
)  # fmt: skip
"""The vocabulary of every tiny language model; `SPECIALS` follow it in a multimodal one."""

LLAVA_TOKENS = {"image_token": "<image>", "video_token": "<video>"}
QWEN_TOKENS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
               "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}  # fmt: skip
INTERNVL_TOKENS = {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
                   "start_image_token": "<img>", "end_image_token": "</img>"}  # fmt: skip
IDEFICS_TOKENS = {"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>",
                  "end_of_utterance_token": "<end_of_utterance>"}  # fmt: skip
IMAGE_TOKENS = {"image_token": "<image>"}
GEMMA_TOKENS = {"image_token": "<image>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
OMNI_TOKENS = {**QWEN_TOKENS, "audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>",
               "audio_eos_token": "<|audio_eos|>"}  # fmt: skip
SPECIALS = {"llava": LLAVA_TOKENS, "llava_next": LLAVA_TOKENS, "llava_onevision": LLAVA_TOKENS,
            "idefics2": IDEFICS_TOKENS, "qwen2_vl": QWEN_TOKENS, "qwen2_5_vl": QWEN_TOKENS,
            "internvl": INTERNVL_TOKENS, "internvl_chat": INTERNVL_TOKENS, "idefics3": IDEFICS_TOKENS,
            "qwen3_vl": QWEN_TOKENS, "qwen3_vl_moe": QWEN_TOKENS, "gemma3": GEMMA_TOKENS, "paligemma": IMAGE_TOKENS,
            "mistral3": IMAGE_TOKENS, "mllama": IMAGE_TOKENS, "deepseek_vl": IMAGE_TOKENS, "qwen2_5_omni": OMNI_TOKENS,
            "qwen2_audio": {"audio_token": "<|AUDIO|>"}}  # fmt: skip
"""The tokens that a multimodal family adds, by the role they have in its processor."""

HIDDEN, ROWS, IMAGE, PATCH = 32, 64, 16, 8
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARE = {**TOWER, "image_size": IMAGE, "patch_size": PATCH}
CLIP = {**SQUARE, "model_type": "clip_vision_model", "projection_dim": 16}
SIGLIP = {**SQUARE, "model_type": "siglip_vision_model", "vision_use_head": False}
INTERNVIT = {**TOWER, "image_size": [IMAGE, IMAGE], "patch_size": [4, 4]}
QWEN_TOWER = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN2_TOWER = {**QWEN_TOWER, "embed_dim": 16, "hidden_size": HIDDEN, "mlp_ratio": 2}
QWEN2_5_TOWER = {**QWEN_TOWER, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": HIDDEN,
                 "window_size": 16, "fullatt_block_indexes": [1]}  # fmt: skip
QWEN3_TOWER = {**QWEN_TOWER, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": HIDDEN,
               "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}  # fmt: skip
PIXTRAL = {**TOWER, "model_type": "pixtral", "head_dim": 8, "image_size": IMAGE, "patch_size": 4}
MLLAMA_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_global_layers": 1,
                "attention_heads": 2, "image_size": IMAGE, "patch_size": PATCH, "max_num_tiles": 2,
                "intermediate_layers_indices": [0], "vision_output_dim": HIDDEN,
                "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}  # fmt: skip
EARS = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_mel_bins": 8,
        "max_source_positions": 20}  # fmt: skip
PERCEIVER = {"hidden_size": HIDDEN, "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2,
             "resampler_head_dim": 8, "num_key_value_heads": 1}  # fmt: skip
ANYRES = {"image_grid_pinpoints": [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE]]}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
CROSS = (1, 3)
"""The layers of a tiny Mllama that look at the image; its own decoder's stand before, between and after them."""

EXPERTS = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MORE = {"qwen3": {"head_dim": 8}, "gemma": {"head_dim": 8}, "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
        "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8}, "mixtral": {"num_local_experts": 2},
        "qwen3_moe": {"head_dim": 8, **EXPERTS}}  # fmt: skip
"""By decoder, what its config has beyond that of a Llama."""


def token_id(family: str, role: str) -> int:
    """The id of one of a family's own tokens."""
    return len(WORDS) + list(SPECIALS[family]).index(role)


def decoder(kind: str, layers: int, rows: int, tie: bool, keys: int = 2) -> dict[str, Any]:
    """The config of a plain language model, which is also that of a text tower; `keys` heads of keys and values."""
    return {
        "model_type": kind, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": keys, "vocab_size": rows, "max_position_embeddings": 512,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": tie, **MORE.get(kind, {}),
    }  # fmt: skip


def vision(family: str) -> dict[str, Any]:
    """The rest of a multimodal config: its eyes, what joins them to the decoder, the tokens that stand for images."""
    image = {"image_token_id": token_id(family, next(iter(SPECIALS[family])))}
    match family:
        case "llava":
            return {"vision_config": CLIP, **image}
        case "llava_next":
            return {"vision_config": CLIP, **ANYRES, **image}
        case "llava_onevision":
            return {"vision_config": SIGLIP, **ANYRES, **image, "video_token_id": token_id(family, "video_token")}
        case "idefics2":
            return {"vision_config": SQUARE, "perceiver_config": PERCEIVER, **image}
        case "idefics3":
            return {"vision_config": {**SQUARE, "patch_size": 4}, "scale_factor": 2, **image}
        case "internvl":
            return {"vision_config": INTERNVIT, "image_seq_length": 4, **image}
        case "gemma3":
            around = {f"{end}_token_index": token_id(family, f"{end}_token") for end in ("boi", "eoi")}
            return {"vision_config": SIGLIP, "mm_tokens_per_image": 4, **around, **indexed(image)}
        case "paligemma":
            return {"vision_config": {**SIGLIP, "projection_dim": HIDDEN}, "projection_dim": HIDDEN, **indexed(image)}
        case "mistral3":
            return {"vision_config": PIXTRAL, "spatial_merge_size": 2, **indexed(image)}
        case "mllama":
            return {"vision_config": MLLAMA_TOWER, **indexed(image)}
        case "deepseek_vl":
            return {"vision_config": SIGLIP, **image}
        case "qwen2_audio":
            return {"audio_config": EARS, "audio_token_index": token_id(family, "audio_token")}
        case "qwen2_5_omni":
            seen = {"vision_config": QWEN2_5_TOWER, "audio_config": {**EARS, "output_dim": HIDDEN, "n_window": 4}}
            ids = {f"{kind}_token_index": token_id(family, f"{kind}_token") for kind in ("image", "video", "audio")}
            ends = {"start": "bos", "end": "eos"}
            around = {f"{kind}_{name}_token_id": token_id(family, f"{kind}_{end}_token")
                      for kind in ("vision", "audio") for name, end in ends.items()}  # fmt: skip
            return {**seen, **ids, **around}
        case _:
            towers = {"qwen2_vl": QWEN2_TOWER, "qwen2_5_vl": QWEN2_5_TOWER}
            tower = towers.get(family, QWEN3_TOWER)
            video = {"video_token_id": token_id(family, "video_token")}
            start = {"vision_start_token_id": token_id(family, "vision_bos_token")}
            end = {"vision_end_token_id": token_id(family, "vision_eos_token")}
            return {"vision_config": tower, **image, **video, **start, **end}


def indexed(image: dict[str, int]) -> dict[str, int]:
    """The same token under the name that some configs have for it."""
    return {"image_token_index": image["image_token_id"]}


def config_of(family: str, text: dict[str, Any]) -> Any:
    """The transformers config of a tiny checkpoint of any family that has a class there, with the decoder `text`."""
    if family in LLMS:
        return AutoConfig.for_model(**text)
    if family.startswith("qwen") and family != "qwen2_audio":
        del text["model_type"]
        text["rope_parameters"] = MROPE
    if family == "mllama":
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
        own = {"model_type": "mllama_text_model", "num_hidden_layers": text["num_hidden_layers"] + len(CROSS)}
        text |= {**own, "cross_attention_layers": list(CROSS), **rope}
    name = MODEL_TYPES.get(family, family)
    tie = text["tie_word_embeddings"]
    return AutoConfig.for_model(name, text_config=text, tie_word_embeddings=tie, **vision(family))


def image_settings(family: str) -> dict[str, Any]:
    """preprocessor_config.json of a family whose processor cannot be built without torchvision."""
    if family.startswith("qwen") and family != "qwen2_audio":
        sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 256, "max_pixels": 1024}
        return {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor", **sizes}
    size = {"size": {"height": IMAGE, "width": IMAGE}}
    if family == "llava_onevision":
        kinds = {"image_processor_type": "LlavaOnevisionImageProcessor", "processor_class": "LlavaOnevisionProcessor"}
        return {**kinds, **size, **ANYRES}
    return {"image_processor_type": "GotOcr2ImageProcessor" if family == "internvl" else "CLIPImageProcessor", **size}
