"""Qwen2.5-Omni: Qwen2.5-VL's names and an audio tower, alone (the thinker) or beside what speaks.

The thinker's names are in a published index; those of the whole are the modules of transformers' class.
"""

from __future__ import annotations

from dataclasses import replace

from polymerge.families.qwen2_vl import QWEN2_VL
from polymerge.families.rules import Family, Rule

_THINKER = (
    *(Rule(f"{outer}audio_tower.{{rest}}", "audio.{rest}") for outer in ("", "model.")),
    *QWEN2_VL.rules,
)

QWEN2_5_OMNI = Family(
    "qwen2_5_omni",
    rules=(
        *_THINKER,
        *(replace(rule, pattern=f"thinker.{rule.pattern}") for rule in _THINKER),
        Rule("talker.{rest}", "audio.talker.{rest}"),
        Rule("token2wav.{rest}", "audio.token2wav.{rest}"),
    ),
    model_types=("qwen2_5_omni", "qwen2_5_omni_thinker"),
    architectures=(
        "Qwen2_5OmniModel",
        "Qwen2_5OmniForConditionalGeneration",
        "Qwen2_5OmniThinkerForConditionalGeneration",
    ),
    decoders=("qwen2",),
    title="Qwen2.5-Omni, whole or its thinker",
    source="Qwen/Qwen2.5-Omni-7B",
    defaults={"num_hidden_layers": 28, "hidden_size": 3584, "vocab_size": 152064},
    mark="audio.{rest}",
)
