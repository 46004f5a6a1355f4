"""Qwen's models with vision and audio, except Qwen2-Audio, which has LLaVA's outer names."""

from __future__ import annotations

from dataclasses import replace

from polymerge.families.rules import Family, Rule
from polymerge.families.tables.llama_like import HEAD, decoder

QWEN2_VL = Family(
    "qwen2_vl",
    rules=(
        Rule("visual.merger.{rest}", "projector.{rest}"),
        Rule("visual.{rest}", "vision.{rest}"),
        *decoder("model."),
        HEAD,
        # names of transformers 5 in memory
        Rule("model.visual.merger.{rest}", "projector.{rest}"),
        Rule("model.visual.{rest}", "vision.{rest}"),
        *decoder("model.language_model."),
    ),
    model_types=("qwen2_vl",),
    architectures=("Qwen2VLForConditionalGeneration",),
    decoders=("qwen2",),
    title="Qwen2-VL",
    source="Qwen/Qwen2-VL-7B-Instruct",
    mark="vision.blocks.{i}.mlp.fc1.weight",
    published=(
        Rule("model.visual.{rest}", "visual.{rest}"),
        Rule("model.language_model.{rest}", "model.{rest}"),
    ),
)
"""The decoder is stored as in a plain Qwen2, with the vision tower beside it."""

QWEN2_5_VL = Family(
    "qwen2_5_vl",
    rules=QWEN2_VL.rules,
    model_types=("qwen2_5_vl",),
    architectures=("Qwen2_5_VLForConditionalGeneration",),
    decoders=("qwen2",),
    title="Qwen2.5-VL",
    source="Qwen/Qwen2.5-VL-7B-Instruct",
    mark="vision.blocks.{i}.mlp.gate_proj.weight",
    published=QWEN2_VL.published,
)

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
    published=tuple(
        Rule(outer + rule.pattern, f"{outer}{rule.canonical}")
        for outer in ("", "thinker.")
        for rule in (Rule("model.audio_tower.{rest}", "audio_tower.{rest}"), *QWEN2_VL.published)
    ),
)
"""Qwen2.5-VL's names and an audio tower (the thinker), alone or with the talker. The thinker's names are from a
published index; those of all of it are the modules of transformers' class."""

QWEN3_VL = Family(
    "qwen3_vl",
    rules=(
        Rule("model.visual.merger.{rest}", "projector.{rest}"),
        Rule("model.visual.deepstack_merger_list.{rest}", "projector.deepstack_merger_list.{rest}"),
        Rule("model.visual.{rest}", "vision.{rest}"),
        *decoder("model.language_model."),
        HEAD,
    ),
    model_types=("qwen3_vl",),
    architectures=("Qwen3VLForConditionalGeneration",),
    decoders=("qwen3",),
    title="Qwen3-VL",
    source="Qwen/Qwen3-VL-8B-Instruct",
    mark="vision.blocks.{i}.mlp.linear_fc1.weight",
)
"""Names on disk equal those in memory; three more projectors read intermediate layers of the vision tower."""

QWEN3_VL_MOE = Family(
    "qwen3_vl_moe",
    rules=QWEN3_VL.rules,
    model_types=("qwen3_vl_moe",),
    architectures=("Qwen3VLMoeForConditionalGeneration",),
    decoders=("qwen3_moe",),
    title="Qwen3-VL (experts)",
    source="Qwen/Qwen3-VL-30B-A3B-Instruct",
    mark="vision.blocks.{i}.mlp.linear_fc1.weight",
    flipped=True,
)
"""All experts of a layer are one tensor, on disk too. Published files have each expert transposed against what
transformers 5 has in memory; shapes tell the two apart."""
