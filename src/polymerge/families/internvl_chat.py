"""InternVL 2, 2.5 and 3 as first published, with modelling code beside the weights."""

from __future__ import annotations

from polymerge.families.decoder import decoder, internlm2_decoder
from polymerge.families.rules import Family, Rule

INTERNVL_CHAT = Family(
    "internvl_chat",
    rules=(
        Rule("vision_model.{rest}", "vision.{rest}"),
        Rule("mlp1.{rest}", "projector.{rest}"),
        *internlm2_decoder("language_model.model."),
        *decoder("language_model.model."),
        Rule("language_model.lm_head.weight", "text.lm_head.weight"),
        Rule("language_model.output.weight", "text.lm_head.weight"),
    ),
    model_types=("internvl_chat",),
    architectures=("InternVLChatModel",),
    decoders=("llama", "qwen2", "internlm2"),
    title="InternVL 2, 2.5, 3 (as published)",
    source="OpenGVLab/InternVL2_5-8B",
    lineages={"internvl_chat": ""},
)
