"""Qwen2-Audio: LLaVA's outer names, with an audio tower in the place of the eyes."""

from __future__ import annotations

from polymerge.families.decoder import decoder
from polymerge.families.rules import Family, Rule

QWEN2_AUDIO = Family(
    "qwen2_audio",
    rules=(
        *decoder("language_model.model."),
        Rule("language_model.lm_head.weight", "text.lm_head.weight"),
        Rule("multi_modal_projector.{rest}", "projector.{rest}"),
        Rule("audio_tower.{rest}", "audio.{rest}"),
        # what transformers 5 calls them in memory
        *decoder("model.language_model."),
        Rule("lm_head.weight", "text.lm_head.weight"),
        Rule("model.multi_modal_projector.{rest}", "projector.{rest}"),
        Rule("model.audio_tower.{rest}", "audio.{rest}"),
    ),
    model_types=("qwen2_audio",),
    architectures=("Qwen2AudioForConditionalGeneration",),
    decoders=("qwen2",),
    title="Qwen2-Audio",
    source="Qwen/Qwen2-Audio-7B-Instruct",
)
