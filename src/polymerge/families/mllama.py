"""Llama 3.2 Vision: a Llama 3.1 with layers between its own that look at the image, which are part of the projector.

The config lists those layers (`projector.cross_layers`); the others are counted without them, as the LLM has them.
"""

from __future__ import annotations

from polymerge.families.decoder import decoder
from polymerge.families.rules import Family, Rule

MLLAMA = Family(
    "mllama",
    rules=(
        *decoder("language_model.model."),
        Rule("language_model.lm_head.weight", "text.lm_head.weight"),
        Rule("multi_modal_projector.{rest}", "projector.{rest}"),
        Rule("vision_model.{rest}", "vision.{rest}"),
        # what transformers 5 calls them in memory
        *decoder("model.language_model."),
        Rule("lm_head.weight", "text.lm_head.weight"),
        Rule("model.multi_modal_projector.{rest}", "projector.{rest}"),
        Rule("model.vision_model.{rest}", "vision.{rest}"),
    ),
    model_types=("mllama",),
    architectures=("MllamaForConditionalGeneration",),
    decoders=("llama",),
    title="Llama 3.2 Vision",
    source="meta-llama/Llama-3.2-11B-Vision-Instruct",
    defaults={
        "num_hidden_layers": 40,
        "vocab_size": 128256,
        "cross_attention_layers": (3, 8, 13, 18, 23, 28, 33, 38),
    },
    interleaved="cross_attention_layers",
)
