"""What the tiny models are asked when they are to say something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer

from tiny_configs import IMAGE, LLMS, WITH_PROCESSOR


def question(model: Any, folder: Path, family: str) -> dict[str, Tensor]:
    """A sum, and for a model with eyes an image that is a ramp of grey."""
    words = "<s> what is 2 + 3 ?"
    if family in WITH_PROCESSOR:
        ramp = Image.linear_gradient("L").resize((IMAGE, IMAGE)).convert("RGB")
        processor = AutoProcessor.from_pretrained(folder)
        return dict(processor(images=ramp, text="<image> " + words, return_tensors="pt"))
    ids = AutoTokenizer.from_pretrained(folder)(words, return_tensors="pt")["input_ids"]
    if family in LLMS:
        return {"input_ids": ids}
    seen = _pixels(family)
    if family == "mllama":  # sees by its cross-attention, in every word of the question
        return {"input_ids": ids, "cross_attention_mask": torch.ones(1, ids.shape[1], 1, 2).long(), **seen}
    if family == "qwen2_audio":  # a quarter of its frames
        token, count = model.config.audio_token_id, 10
    else:
        token = model.config.image_token_id
        count = len(torch.cat(tuple(model.model.get_image_features(**seen).pooler_output)))
    image = torch.full((1, count), token)
    question = {"input_ids": torch.cat([image, ids], dim=1), **seen}
    if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"):
        question["mm_token_type_ids"] = (question["input_ids"] == token).int()
    return question


def _pixels(family: str) -> dict[str, Tensor]:
    """The ramp as the processors of the other families would hand it on."""
    if family == "qwen2_audio":
        heard = torch.linspace(-1, 1, 8 * 40).reshape(1, 8, 40)
        return {"input_features": heard, "feature_attention_mask": torch.ones(1, 40).long()}
    if family.startswith("qwen"):
        return {
            "pixel_values": torch.linspace(-1, 1, 16 * 96).reshape(16, 96),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        }
    crops = torch.linspace(-1, 1, 3 * 3 * IMAGE * IMAGE).reshape(1, 3, 3, IMAGE, IMAGE)
    match family:
        case "internvl" | "gemma3" | "paligemma" | "deepseek_vl":
            return {"pixel_values": crops[:, 0]}
        case "idefics3":
            return {"pixel_values": crops[:, :1]}
        case "mistral3":
            return {"pixel_values": crops[:, 0], "image_sizes": torch.tensor([[IMAGE, IMAGE]])}
        case "mllama":
            ratios = {"aspect_ratio_ids": torch.tensor([[2]]), "aspect_ratio_mask": torch.ones(1, 1, 2).long()}
            return {"pixel_values": crops[:, None, :2], **ratios}
    return {"pixel_values": crops, "image_sizes": torch.tensor([[IMAGE, 2 * IMAGE]])}
