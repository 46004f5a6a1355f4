"""mPLUG-Owl2: a Llama with two ways through norms, keys and values, 0 for text tokens and 1 for image tokens.

Names as its own conversion script writes them.
"""

from __future__ import annotations

from polymerge.families.decoder import decoder
from polymerge.families.rules import Family, Rule

_WAYS = (("0", "text"), ("1", "image"))
_TWICE = ("input_layernorm", "post_attention_layernorm", "self_attn.k_proj", "self_attn.v_proj")

MPLUG_OWL2 = Family(
    "mplug_owl2",
    rules=(
        *(
            Rule(f"model.layers.{{i}}.{name}.multiway.{way}.{{rest}}", f"text.layers.{{i}}.{name}.{{rest}}@{branch}")
            for name in _TWICE
            for way, branch in _WAYS
        ),
        *decoder("model."),
        Rule("lm_head.weight", "text.lm_head.weight"),
        Rule("model.vision_model.{rest}", "vision.{rest}"),
        Rule("model.visual_abstractor.{rest}", "projector.{rest}"),
    ),
    model_types=("mplug_owl2",),
    architectures=("MPLUGOwl2LlamaForCausalLM",),
    decoders=("llama",),
    title="mPLUG-Owl2",
    source="MAGAer13/mplug-owl2-llama2-7b",
)
