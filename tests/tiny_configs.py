"""The sizes, vocabularies and configs of the tiny checkpoints that `tiny.py` builds."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

LLMS = ("llama", "mistral", "qwen2")
VLMS = ("llava", "llava_next", "llava_onevision", "idefics2", "qwen2_vl", "qwen2_5_vl", "internvl", "internvl_chat")

TEXT = {"llava": "llama", "llava_next": "llama", "llava_onevision": "qwen2", "idefics2": "mistral",
        "qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2", "internvl": "qwen2", "internvl_chat": "llama"}  # fmt: skip
"""The decoder that each multimodal family has when none is asked for."""

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
SPECIALS = {"llava": LLAVA_TOKENS, "llava_next": LLAVA_TOKENS, "llava_onevision": LLAVA_TOKENS,
            "idefics2": IDEFICS_TOKENS, "qwen2_vl": QWEN_TOKENS, "qwen2_5_vl": QWEN_TOKENS,
            "internvl": INTERNVL_TOKENS, "internvl_chat": INTERNVL_TOKENS}  # fmt: skip
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
PERCEIVER = {"hidden_size": HIDDEN, "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2,
             "resampler_head_dim": 8, "num_key_value_heads": 1}  # fmt: skip
ANYRES = {"image_grid_pinpoints": [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE]]}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}


def token_id(family: str, role: str) -> int:
    """The id of one of a family's own tokens."""
    return len(WORDS) + list(SPECIALS[family]).index(role)


def decoder(kind: str, layers: int, rows: int, tie: bool) -> dict[str, Any]:
    """The config of a plain language model, which is also that of a text tower."""
    return {
        "model_type": kind, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": rows, "max_position_embeddings": 512,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": tie,
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
        case "internvl":
            return {"vision_config": INTERNVIT, "image_seq_length": 4, **image}
        case _:
            tower = QWEN2_TOWER if family == "qwen2_vl" else QWEN2_5_TOWER
            video = {"video_token_id": token_id(family, "video_token")}
            start = {"vision_start_token_id": token_id(family, "vision_bos_token")}
            end = {"vision_end_token_id": token_id(family, "vision_eos_token")}
            return {"vision_config": tower, **image, **video, **start, **end}


def config_of(family: str, kind: str, layers: int, rows: int, tie: bool) -> Any:
    """The transformers config of a tiny checkpoint of any family that has a class there."""
    text = decoder(kind, layers, rows, tie)
    if family in LLMS:
        return AutoConfig.for_model(**text)
    if family.startswith("qwen"):
        del text["model_type"]
        text["rope_parameters"] = MROPE
    return AutoConfig.for_model(family, text_config=text, tie_word_embeddings=tie, **vision(family))


def image_settings(family: str) -> dict[str, Any]:
    """preprocessor_config.json of a family whose processor cannot be built without torchvision."""
    if family.startswith("qwen"):
        sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 256, "max_pixels": 1024}
        return {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor", **sizes}
    size = {"size": {"height": IMAGE, "width": IMAGE}}
    if family == "llava_onevision":
        kinds = {"image_processor_type": "LlavaOnevisionImageProcessor", "processor_class": "LlavaOnevisionProcessor"}
        return {**kinds, **size, **ANYRES}
    return {"image_processor_type": "GotOcr2ImageProcessor" if family == "internvl" else "CLIPImageProcessor", **size}
