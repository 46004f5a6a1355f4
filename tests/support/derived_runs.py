"""Whether a tiny model of any type runs: what it answers to whatever input it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Question", "question_for"]

TOKENS, START = [[11, 12, 13]], 1
SIDE, FRAMES, SAMPLES = 32, 40, 8000
"""Of pictures, of spectrograms in frames, of sounds in samples."""

_BINS = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Question:
    """An input that a model takes, and whether it generates from it or only has a forward pass."""

    inputs: Inputs
    generates: bool

    def answered_by(self, model: Any) -> Tensor:
        """The scores of the first token of two that are generated greedily, or of a forward pass."""
        torch.manual_seed(0)
        with torch.no_grad():
            return _generated(model, self.inputs) if self.generates else _passed(model, self.inputs)


def question_for(model: Any) -> Question | None:
    """The first input that a model generates from, or passes on; None if it takes none of those tried."""
    for generates in (True, False):
        for inputs in _inputs(model):
            question = Question(inputs, generates)
            try:
                scores = question.answered_by(model)
            except Exception:
                continue
            if scores.numel() and bool(torch.isfinite(scores).any()):
                return question
    return None


def _generated(model: Any, inputs: Inputs) -> Tensor:
    said = {"decoder_start_token_id": START} if model.config.is_encoder_decoder else {}
    told = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    if hasattr(model, "has_talker"):  # it would speak as well
        told["generation_mode"] = "text"
    return model.generate(**inputs, **told, **said).logits[0]


def _passed(model: Any, inputs: Inputs) -> Tensor:
    more = {"decoder_input_ids": torch.tensor([[START]])} if model.config.is_encoder_decoder else {}
    found = model(**inputs, **more)
    return next(one for one in (getattr(found, "logits", None), *found.to_tuple()) if isinstance(one, Tensor))


def _inputs(model: Any) -> Iterator[Inputs]:
    """Texts, pictures and sounds, alone and together, as the classes of transformers call them."""
    config = model.config
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    text = {"input_ids": torch.tensor(TOKENS)}
    side = _found(config, "image_size", SIDE)
    bins = next((one for key in _BINS if (one := _found(config, key, 0))), 8)
    picture = {"pixel_values": drawn(1, 3, side, side)}
    frames = 2 * _found(config, "max_source_positions", FRAMES // 2)
    sounds: tuple[Callable[[], Inputs], ...] = (
        lambda: {"input_features": drawn(1, bins, frames)},
        lambda: {"input_features": drawn(1, frames, bins)},
        lambda: {"input_values": drawn(1, SAMPLES)},
        lambda: {"input_values": drawn(1, 1, SAMPLES)},
    )
    if own := _OWN.get(config.model_type):
        yield {key: torch.full(size, value) if value else drawn(*size) for key, (size, value) in own.items()}
    yield text
    yield picture
    yield text | picture
    for sound in sounds:
        yield sound()
        yield text | sound()


_QUERIES: dict[str, tuple[tuple[int, ...], float]] = {"input_ids": ((1, 32), 7), "qformer_input_ids": ((1, 3), 11)}
_OWN: dict[str, dict[str, tuple[tuple[int, ...], float]]] = {
    "blip-2": {"pixel_values": ((1, 3, SIDE, SIDE), 0), "input_ids": ((1, 32), 7)},
    "idefics": {"pixel_values": ((1, 1, 3, SIDE, SIDE), 0), "input_ids": ((1, 3), 11),
                "image_attention_mask": ((1, 3, 1), 1)},
    "instructblip": {"pixel_values": ((1, 3, SIDE, SIDE), 0), **_QUERIES},
    "instructblipvideo": {"pixel_values": ((1, 1, 3, SIDE, SIDE), 0), **_QUERIES},
    "kosmos-2": {"pixel_values": ((1, 3, SIDE, SIDE), 0), "input_ids": ((1, 64), 11),
                 "image_embeds_position_mask": ((1, 64), True)},
    "pix2struct": {"flattened_patches": ((1, 4, 770), 1.0)},
    "udop": {"input_ids": ((1, 3), 11), "bbox": ((1, 3, 4), 0.5)},
}  # fmt: skip
"""By model type, inputs of a kind that no other class takes: the size of each, and what it is full of; 0 is drawn."""


def _found(config: Any, key: str, otherwise: int) -> int:
    """The first number of that name anywhere in a config."""
    said = config.to_dict() if hasattr(config, "to_dict") else config
    inner = [value for value in said.values() if isinstance(value, dict)]
    value = said.get(key)
    if isinstance(value, int):
        return value
    return next((one for part in inner if (one := _found(part, key, 0))), otherwise)
