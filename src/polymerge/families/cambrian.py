"""Cambrian-1 in its authors' layout: names from the modules that their modelling code defines (cambrian_arch.py)."""

from __future__ import annotations

from polymerge.families.decoder import decoder
from polymerge.families.rules import Family, Rule

CAMBRIAN = Family(
    "cambrian",
    rules=(
        *decoder("model."),
        Rule("lm_head.weight", "text.lm_head.weight"),
        Rule("model.mm_projector.{rest}", "projector.{rest}"),
        Rule("model.mm_projector_aux_{rest}", "projector.aux_{rest}"),
        Rule("model.vision_sampler_{rest}", "projector.vision_sampler_{rest}"),
        Rule("model.vision_query", "projector.vision_query"),
        Rule("model.image_newline", "projector.image_newline"),
        Rule("model.vision_tower_aux_list.{rest}", "vision.{rest}"),
    ),
    model_types=("cambrian_llama",),
    architectures=("CambrianLlamaForCausalLM",),
    decoders=("llama",),
    title="Cambrian-1",
    source="nyu-visionx/cambrian-8b",
)
