"""InternVL 2, 2.5 and 3 as first published, with modelling code beside the weights."""

from __future__ import annotations

from polymerge.families.decoder import decoder
from polymerge.mapping import Family, Rule

INTERNVL_CHAT = Family(
    "internvl_chat",
    rules=(
        Rule("vision_model.{rest}", "vision.{rest}"),
        Rule("mlp1.{rest}", "projector.{rest}"),
        *decoder("language_model.model."),
        Rule("language_model.lm_head.weight", "text.lm_head.weight"),
        # An InternLM2 decoder fuses q, k and v and has leaf names of its own. They are kept as they are, so it can be
        # merged with its like; a Llama-like decoder shares no layer name with it but the norm.
        Rule("language_model.model.tok_embeddings.weight", "text.tok_embeddings.weight"),
        Rule("language_model.output.weight", "text.output.weight"),
    ),
    model_types=("internvl_chat",),
    architectures=("InternVLChatModel",),
    decoders=("llama", "qwen2", "internlm2"),
    title="InternVL 2, 2.5, 3 (as published)",
    source="OpenGVLab/InternVL2_5-8B",
)
