"""Configs, tokenizers and routers of what is merged: what does not fit is said by its values, and nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import polymerge
from polymerge.families.config import CLASS_DEFAULTS
from polymerge.families.rules import PARTS
from polymerge.planning.compatibility import COMPARED, config_warnings, differences, merged_routers
from running import checkpoint, cli, linear, merged, recipe_file, tensor, with_tokens

Config = dict[str, Any]

# --- configs as published; only what matters of them

QWEN2: Config = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 3584,
    "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28, "torch_dtype": "bfloat16",
    "attention_dropout": 0.0, "initializer_range": 0.02, "bos_token_id": 151643, "max_position_embeddings": 131072,
}  # fmt: skip
QWEN2_MATH = QWEN2 | {"max_position_embeddings": 4096, "rope_theta": 10000, "sliding_window": 4096}
QWEN2_VL = QWEN2 | {
    "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "sliding_window": 32768,
    "max_position_embeddings": 32768, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "in_chans": 3, "patch_size": 14,
                      "spatial_merge_size": 2, "temporal_patch_size": 2, "hidden_size": 3584},
}  # fmt: skip
QWEN2_VL_SAVED_BY_4 = {  # transformers 4.52 and later: nested, without what equals the class's default
    "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl",
    "text_config": {"model_type": "qwen2_vl_text", "hidden_size": 3584, "num_attention_heads": 28,
                    "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "sliding_window": None,
                    "layer_types": ["full_attention"] * 28,
                    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}},
    "vision_config": {"model_type": "qwen2_vl", "in_chans": 3, "in_channels": 3, "patch_size": 14},
}  # fmt: skip
QWEN2_VL_SAVED_BY_5 = {
    "model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"],
    "text_config": {"model_type": "qwen2_vl_text", "hidden_act": "silu", "hidden_size": 3584,
                    "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
                    "use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * 28,
                    "rope_parameters": {"mrope_section": [16, 24, 24], "rope_theta": 1e6, "rope_type": "default"}},
    "vision_config": {"model_type": "qwen2_vl_vision", "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2,
                      "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"}},
}  # fmt: skip
LLAMA3: Config = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "hidden_act": "silu",
    "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 500000.0, "vocab_size": 128256, "pretraining_tp": 1,
}  # fmt: skip
LLAMA31_SCALING = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                   "original_max_position_embeddings": 8192, "rope_type": "llama3"}  # fmt: skip
LLAVA_NEXT: Config = {
    "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next",
    "projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    "text_config": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 8192,
                    "intermediate_size": 14336, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
                    "rope_theta": 500000.0, "vocab_size": 128320},
    "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "patch_size": 14,
                      "num_attention_heads": 16, "num_hidden_layers": 24, "projection_dim": 768},
}  # fmt: skip
LLAVA15_TEXT: Config = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05,
                        "vocab_size": 32064}  # fmt: skip
VICUNA: Config = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32,
                  "hidden_act": "silu", "rms_norm_eps": 1e-05, "rope_scaling": None}  # fmt: skip
GEMMA2: Config = {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
                  "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256,
                  "sliding_window": 4096, "head_dim": 256, "rope_theta": 10000.0, "rms_norm_eps": 1e-06}  # fmt: skip
GEMMA3: Config = {"model_type": "gemma3_text", "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
                  "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}  # fmt: skip
GEMMA3_SAVED_BY_5: Config = {
    "model_type": "gemma3_text", "sliding_window": 1024, "hidden_activation": "gelu_pytorch_tanh",
    "rope_parameters": {"full_attention": {"factor": 8.0, "rope_theta": 1000000.0, "rope_type": "linear"},
                        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"}},
}  # fmt: skip
MISTRAL: Config = {"model_type": "mistral", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
                   "rope_theta": 10000.0, "sliding_window": 4096, "rms_norm_eps": 1e-05}  # fmt: skip
GRANITE: Config = {"model_type": "granite", "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
                   "attention_multiplier": 0.0078125, "logits_scaling": 16.0}  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (QWEN2_VL, QWEN2),
        (QWEN2_VL, QWEN2_VL_SAVED_BY_4),
        (QWEN2_VL, QWEN2_VL_SAVED_BY_5),
        (QWEN2_VL_SAVED_BY_4, QWEN2_VL_SAVED_BY_5),
        (QWEN2_VL_SAVED_BY_4, QWEN2),
        (QWEN2_VL_SAVED_BY_5, QWEN2),
        (LLAVA_NEXT, LLAMA3),
        ({"model_type": "llava", "text_config": LLAVA15_TEXT}, VICUNA),
        # the class's default said and left out, an older config that has no such key, another way to write a number
        (VICUNA | {"rope_theta": 10000}, VICUNA),
        (LLAMA3, {key: LLAMA3[key] for key in LLAMA3 if key not in ("attention_bias", "hidden_act", "rope_scaling")}),
        (LLAMA3 | {"head_dim": 128}, LLAMA3 | {"head_dim": None}),
        (LLAMA3 | {"rms_norm_eps": 1.00000000001e-05}, LLAMA3),
        # what does not change what a weight means
        (LLAMA3 | {"max_position_embeddings": 8192, "dtype": "float16"},
         LLAMA3 | {"use_cache": False, "eos_token_id": 2}),
        # two generations of one config
        (LLAMA3 | {"rope_scaling": LLAMA31_SCALING},
         {**LLAMA3, "rope_theta": None, "rope_parameters": LLAMA31_SCALING | {"rope_theta": 500000.0}}),
        (LLAMA3 | {"rope_scaling": {"type": "linear", "factor": 4}},
         LLAMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        # InternVL's: longer contexts than trained alone are turned otherwise
        ({"model_type": "internvl_chat", "llm_config": QWEN2 | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}},
         QWEN2),
        (GEMMA3, GEMMA3_SAVED_BY_5),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "sliding_window": 1024,
          "rope_scaling": GEMMA3["rope_scaling"]}}, GEMMA3),
        ({"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None},
         {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"}),
        (GEMMA2, GEMMA2 | {"layer_types": ["sliding_attention", "full_attention"]}),
        # unknown on one side
        (GRANITE, {"model_type": "granite"}),
        ({"model_type": "phi3_v", "architectures": ["Phi3VForCausalLM"]}, LLAMA3),
        ({}, LLAMA3),
        # not what configs hold
        (LLAMA3, LLAMA3 | {"rope_scaling": "linear", "rope_parameters": [], "num_attention_heads": None}),
        ({"model_type": ["llama"], "text_config": 3}, LLAMA3),
    ],
)  # fmt: skip
def test_configs_that_agree(ours: Config, theirs: Config) -> None:
    for part in PARTS:
        assert differences(ours, theirs, part) == {}
        assert differences(theirs, ours, part) == {}


def vision(**said: Any) -> Config:
    return LLAVA_NEXT | {"vision_config": LLAVA_NEXT["vision_config"] | said}


@pytest.mark.parametrize(
    ("part", "ours", "theirs", "found"),
    [
        ("text", QWEN2_VL, QWEN2_MATH, {"rope_theta": (1000000.0, 10000)}),
        ("text", QWEN2_VL_SAVED_BY_4, QWEN2_MATH, {"rope_theta": (1000000.0, 10000)}),
        ("text", QWEN2_VL_SAVED_BY_5, QWEN2_MATH, {"rope_theta": (1000000.0, 10000)}),
        ("text", LLAVA_NEXT, LLAMA3 | {"rope_scaling": LLAMA31_SCALING}, {"rope_type": ("default", "llama3")}),
        ("text", {"text_config": LLAVA15_TEXT}, VICUNA | {"rope_theta": 1000000.0}, {"rope_theta": (1e4, 1e6)}),
        ("text", LLAMA3 | {"rope_scaling": LLAMA31_SCALING},
         LLAMA3 | {"rope_scaling": LLAMA31_SCALING | {"factor": 32.0}}, {"rope_scaling.factor": (8.0, 32.0)}),
        ("text", LLAMA3, LLAMA3 | {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
         {"rope_type": ("default", "dynamic")}),
        ("text", QWEN2_VL, QWEN2_VL | {"rope_scaling": {"type": "mrope", "mrope_section": [24, 20, 20]}},
         {"rope_scaling.mrope_section[0]": (16, 24)}),
        ("text", GEMMA3, GEMMA3_SAVED_BY_5 | {"rope_parameters": {
            "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
            "sliding_attention": {"rope_theta": 2e4, "rope_type": "default"}}},
         {"rope_local_base_freq": (10000.0, 2e4)}),
        # equal widths: 32 heads of 128 or 16 of 256
        ("text", LLAMA3, LLAMA3 | {"num_attention_heads": 16, "num_key_value_heads": 4},
         {"num_attention_heads": (32, 16), "num_key_value_heads": (8, 4), "head_dim": (128, 256)}),
        ("text", VICUNA, {"architectures": ["CogVLMForCausalLM"], "num_attention_heads": 32, "hidden_size": 4096,
                          "num_multi_query_heads": 8}, {"num_key_value_heads": (32, 8)}),
        ("text", LLAMA3, LLAMA3 | {"hidden_act": "gelu"}, {"hidden_act": ("silu", "gelu")}),
        ("text", LLAMA3, LLAMA3 | {"rms_norm_eps": 1e-6}, {"norm_eps": (1e-05, 1e-06)}),
        ("text", GEMMA2, GEMMA2 | {"attn_logit_softcapping": None}, {"attn_logit_softcapping": (50.0, "none")}),
        ("text", {"text_config": {"model_type": "gemma2"}}, GEMMA2 | {"final_logit_softcapping": None},
         {"final_logit_softcapping": (30.0, "none")}),
        ("text", GEMMA2, GEMMA2 | {"query_pre_attn_scalar": 144}, {"query_pre_attn_scalar": (256, 144)}),
        ("text", MISTRAL, MISTRAL | {"sliding_window": None, "rope_theta": 1e6},
         {"sliding_window": (4096, "none"), "rope_theta": (1e4, 1e6)}),
        ("text", QWEN2, QWEN2 | {"use_sliding_window": True}, {"sliding_window": ("none", 131072)}),
        ("text", GEMMA2 | {"layer_types": ["sliding_attention", "full_attention"]},
         GEMMA2 | {"layer_types": ["sliding_attention", "sliding_attention"]},
         {"layer_types[1]": ("full_attention", "sliding_attention")}),
        ("text", LLAMA3, LLAMA3 | {"attention_bias": True}, {"attention_bias": (False, True)}),
        ("text", GRANITE, GRANITE | {"residual_multiplier": 0.3, "logits_scaling": 8.0},
         {"residual_multiplier": (0.22, 0.3), "logits_scaling": (16.0, 8.0)}),
        ("text", {"model_type": "mixtral"}, {"model_type": "mixtral", "num_experts_per_tok": 1},
         {"num_experts_per_tok": (2, 1)}),
        ("text", {"model_type": "deepseek_v3", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 8},
         {"model_type": "deepseek_v3", "norm_topk_prob": False, "routed_scaling_factor": 1.0, "n_group": 1},
         {"norm_topk_prob": (True, False), "routed_scaling_factor": (2.5, 1.0), "n_group": (8, 1)}),
        ("text", {"model_type": "phi3"}, {"model_type": "phi3", "rope_parameters": {
            "rope_theta": 1e4, "partial_rotary_factor": 0.75}}, {"partial_rotary_factor": (1.0, 0.75)}),
        ("text", LLAMA3, LLAMA3 | {"num_attention_heads": 10**400},
         {"num_attention_heads": (32, str(10**400)), "head_dim": (128, 0)}),
        ("vision", LLAVA_NEXT, vision(patch_size=16, num_attention_heads=8),
         {"patch_size": (14, 16), "num_attention_heads": (16, 8)}),
        ("vision", LLAVA_NEXT, vision(hidden_act="gelu"), {"hidden_act": ("quick_gelu", "gelu")}),
        ("vision", {"vision_config": {"image_size": [448, 448]}}, {"vision_config": {"image_size": 224}},
         {"image_size": (448, 224)}),
        ("vision", {"mm_vision_tower": "openai/clip-vit-large-patch14"},
         {"mm_vision_tower": "/models/clip-vit-large-patch14-336"},
         {"mm_vision_tower": ("clip-vit-large-patch14", "clip-vit-large-patch14-336")}),
        ("projector", LLAVA_NEXT, LLAVA_NEXT | {"vision_feature_layer": -1, "projector_hidden_act": "relu"},
         {"vision_feature_layer": (-2, -1), "projector_hidden_act": ("gelu", "relu")}),
        ("projector", {"mm_vision_select_layer": -2}, {"vision_feature_layer": [-2, -1]},
         {"vision_feature_layer": (-2, [-2, -1])}),
        ("projector", QWEN2_VL, QWEN2_VL | {"vision_config": {"spatial_merge_size": 4}},
         {"spatial_merge_size": (2, 4)}),
        ("audio", {"audio_config": {"num_mel_bins": 128}}, {"audio_config": {"num_mel_bins": 80}},
         {"num_mel_bins": (128, 80)}),
        ("audio", {"thinker_config": {"audio_config": {"n_window": 100}}}, {"audio_config": {"n_window": 50}},
         {"n_window": (100, 50)}),
    ],
)  # fmt: skip
def test_what_contradicts_is_found_with_both_values(
    part: str, ours: Config, theirs: Config, found: Mapping[str, tuple[Any, Any]]
) -> None:
    assert differences(ours, theirs, part) == found
    assert differences(theirs, ours, part) == {name: pair[::-1] for name, pair in found.items()}


def test_parts_are_compared_apart() -> None:
    other = vision(patch_size=16) | {"text_config": LLAVA_NEXT["text_config"] | {"rope_theta": 1e6}}
    assert list(differences(LLAVA_NEXT, other, "text")) == ["rope_theta"]
    assert list(differences(LLAVA_NEXT, other, "vision")) == ["patch_size"]
    assert differences(LLAVA_NEXT, other, "projector") == {}


@pytest.mark.parametrize("kind", CLASS_DEFAULTS)
def test_what_classes_have_is_what_transformers_says(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    rope = getattr(config, "rope_parameters", None) or {}
    for name, value in CLASS_DEFAULTS[kind].items():
        if name == "rope_local_base_freq":
            said = rope["sliding_attention"]["rope_theta"]
        elif name in ("rope_theta", "partial_rotary_factor"):
            said = rope.get("full_attention", rope)[name]
        elif name == "num_key_value_heads" and value is None:
            value, said = config.num_attention_heads, config.num_key_value_heads
        else:
            said = getattr(config, name)
        assert said == value, name
    assert not differences({"model_type": kind}, config.to_dict(), "text")


def test_no_spelling_stands_for_two_things() -> None:
    for part, names in COMPARED.items():
        spelled = [key for keys in names.values() for key in keys]
        assert len(spelled) == len(set(spelled)), part


def test_a_warning_has_both_values_and_all_models_that_have_them() -> None:
    models = [("math", QWEN2_MATH), ("plain", QWEN2), ("code", QWEN2_MATH)]
    assert list(config_warnings(("vlm", QWEN2_VL), models, ("text", "vision"))) == [
        "the configs of template 'vlm' and 'math' and 'code' differ in what they compute with the text weights "
        "(rope_theta: 1000000/10000): the output has the template's config, under which the others' weights were not "
        "trained"
    ]


# --- in a plan


def llama(folder: Path, seed: int, **more: Any) -> Path:
    said: Config = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8} | more
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=20, tie_word_embeddings=False, **said
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def only(found: tuple[str, ...]) -> str:
    (one,) = found
    return one


def test_a_merge_says_what_does_not_fit_and_inspect_too(tmp_path: Path) -> None:
    one = llama(tmp_path / "one", 1, hidden_act="silu")
    rope = {"rope_type": "default", "rope_theta": 5e5}
    two = llama(tmp_path / "two", 2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, rope_parameters=rope)
    said = (
        "the configs of template 'one' and 'two' differ in what they compute with the text weights "
        "(num_attention_heads: 4/2, num_key_value_heads: 2/1, head_dim: 8/16, rope_theta: 10000/500000): the output "
        "has the template's config, under which the others' weights were not trained"
    )
    assert only(polymerge.plan(linear(one, two)).warnings) == said
    asked = linear(one, merge_method="ties", base_model=str(two), template=str(one))
    assert only(polymerge.plan(asked).warnings) == said
    assert polymerge.plan(linear(one, llama(tmp_path / "near", 3))).warnings == ()
    asked = recipe_file(linear(one, two), tmp_path / "r.yaml")
    ran = cli("merge", asked, "-o", tmp_path / "out")
    assert (ran.status, ran.err.splitlines()[0]) == (0, f"note: {said}")
    record = json.loads((tmp_path / "out/polymerge.json").read_text(encoding="utf-8"))
    assert record["plan"]["warnings"] == [said]
    assert said in cli("inspect", one, two).out
    assert cli("plan", asked).out.startswith(f"note: {said}\n\nlinear of 2 models")


def test_a_part_that_is_not_merged_is_not_compared(tmp_path: Path) -> None:
    models = [llama(tmp_path / "one", 1), llama(tmp_path / "two", 2, rms_norm_eps=1e-3)]
    assert "norm_eps: 1e-06/0.001" in only(polymerge.plan(linear(*models)).warnings)
    kept = ["text.embed_tokens.weight", "text.layers.*", "text.norm.weight", "text.lm_head.weight"]
    with pytest.raises(polymerge.errors.Refused, match="nothing would be merged"):
        polymerge.plan(linear(*models, exclude=kept))


def test_models_of_no_known_family_are_compared_too(tmp_path: Path) -> None:
    names = {"model.embed_tokens.weight": torch.ones(3, 2), "model.w.weight": torch.ones(2, 2)}
    models = [
        checkpoint(tmp_path / str(place), names, GRANITE | {"residual_multiplier": value, "vocab_size": 3})
        for place, value in enumerate((0.22, 0.25))
    ]
    for place, model in enumerate(models):
        words = {"a": 0, "b": 1, "cd"[place]: 2}
        (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}), encoding="utf-8")
    configs, tokens, _ = polymerge.plan(linear(*models)).warnings
    assert "(residual_multiplier: 0.22/0.25)" in configs
    assert "1 of 3 rows" in tokens
    assert "(2: 'c'/'d')" in tokens


# --- routers


@pytest.mark.parametrize(
    ("router", "expert"),
    [
        ("text.layers.{}.mlp.gate.weight", "text.layers.0.mlp.experts.0.up_proj.weight"),
        ("text.layers.{}.mlp.shared_expert_gate.weight", ""),
        ("model.layers.{}.mlp.gate.e_score_correction_bias", "model.layers.0.mlp.experts.0.up_proj.weight"),
        ("model.layers.{}.block_sparse_moe.router.layer.weight", ""),
        ("model.layers.{}.block_sparse_moe.gate.weight", "model.layers.1.block_sparse_moe.experts.0.w1.weight"),
        ("model.layers.{}.feed_forward.router.weight", ""),
        ("model.layers.{}.mlp.router.bias", ""),
        ("model.layers.{}.mlp.router.gate.weight", ""),
        ("model.layers.{}.router.per_expert_scale", "model.layers.0.experts.gate_up_proj"),
        ("model.layers.{}.mlp.gate.weight_1", "model.layers.0.mlp.experts.0.up_proj.weight"),
    ],
)
def test_every_family_s_routers(router: str, expert: str) -> None:
    names = [router.format(layer) for layer in range(12)]
    glob = router.format("*")
    beside = [expert.replace(".0.", f".{layer}.", 1).replace(".1.", f".{layer}.", 1) for layer in range(12)]
    said = only(tuple(merged_routers(names, [*names, *beside])))
    assert "(12 tensors)" in said
    assert said.endswith(f'say exclude: ["{glob}"]')


@pytest.mark.parametrize("name", ["text.layers.0.mlp.gate_proj.weight", "text.layers.0.mlp.gate.weight", "a.gate"])
def test_a_gate_without_experts_is_no_router(name: str) -> None:
    assert list(merged_routers([name], [name])) == []


def experts(seed: int) -> dict[str, torch.Tensor]:
    """A Mixtral of one layer and two experts."""
    moe = "model.layers.0.block_sparse_moe"
    shapes = {f"{moe}.gate.weight": (2, 6)}
    shapes |= {f"{moe}.experts.{e}.{w}.weight": (9, 6) for e in (0, 1) for w in ("w1", "w3")}
    shapes |= {f"{moe}.experts.{e}.w2.weight": (6, 9) for e in (0, 1)}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_a_router_that_is_merged_is_said_with_what_keeps_the_template_s(tmp_path: Path) -> None:
    one, two = (checkpoint(tmp_path / str(seed), experts(seed), {"model_type": "mixtral"}) for seed in (1, 2))
    said = only(polymerge.plan(linear(one, two)).warnings)
    assert said == (
        "the routers of experts are merged (1 tensors): one that is averaged sends tokens to other experts than those "
        'trained for them. To keep the template\'s, say exclude: ["text.layers.*.mlp.gate.weight"]'
    )
    kept = linear(one, two, exclude=["text.layers.*.mlp.gate.weight"])
    assert polymerge.plan(kept).warnings == ()
    out, name = merged(kept, tmp_path / "out", "--no-verify"), "model.layers.0.block_sparse_moe.gate.weight"
    assert torch.equal(tensor(out, name), tensor(one, name))
    # one model's delta with half a weight is an average with its base too
    half = linear(one, merge_method="task_arithmetic", base_model=str(two))
    assert polymerge.plan(half).warnings == (said,)
    # one model alone is not averaged with another
    assert polymerge.plan(linear(two)).warnings == ()


def lora(folder: Path, seed: int, module: str, **config: Any) -> Path:
    """An adapter of one module, with the config of what it is for beside it."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"lora_A": (2, 6), "lora_B": (4, 2)}
    folder.mkdir()
    save_file(
        {
            f"base_model.model.{module}.{factor}.weight": torch.randn(shape, generator=generator)
            for factor, shape in shapes.items()
        },
        folder / "adapter_model.safetensors",
    )
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [module.rpartition(".")[2]]}
    (folder / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_adapters_are_compared_by_the_configs_beside_them(tmp_path: Path) -> None:
    module = "model.layers.0.mlp.gate"
    one = lora(tmp_path / "one", 1, module, model_type="qwen3_moe", rope_theta=1e6)
    two = lora(tmp_path / "two", 2, module, model_type="qwen3_moe", rope_theta=1e4)
    configs, routers = polymerge.plan(linear(one, two)).warnings
    assert configs.startswith("the configs of template 'one' and 'two' differ in what they compute with the text ")
    assert "(rope_theta: 1000000/10000)" in configs
    assert routers.endswith('say exclude: ["text.layers.*.mlp.gate.weight"]')
    kept = polymerge.plan(linear(one, two, exclude=["text.layers.*.mlp.gate.weight"]))
    assert kept.warnings == (configs,)


# --- how a plan is shown


def on_a_terminal(*words: object, **more: str) -> str:
    """What a command prints where its output is a terminal."""
    main, end = os.openpty()
    env = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"} | more
    command = [sys.executable, "-c", "from polymerge.cli import main; main()", *map(str, words)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=end, stderr=end, env=env) as process:
        os.close(end)
        found = b""
        while True:
            try:
                data = os.read(main, 1 << 16)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            found += data
    os.close(main)
    assert process.returncode == 0
    return found.decode().replace("\r\n", "\n")


def test_fates_have_colours_on_a_terminal_and_nowhere_else(tmp_path: Path) -> None:
    models = with_tokens(tmp_path / "one", 1, list("abcdefg")), with_tokens(tmp_path / "two", 2, list("abcdefx"))
    asked = recipe_file(linear(*models, exclude=["text.norm.weight"]), tmp_path / "r.yaml")
    plain = cli("plan", asked).out
    assert "\x1b" not in plain
    assert plain.startswith("note: the rows of")
    assert on_a_terminal("plan", asked, NO_COLOR="1") == plain
    coloured = on_a_terminal("plan", asked)
    for text in (
        "\x1b[33mnote:\x1b[0m the rows of",
        "\n\x1b[32mmerged\x1b[0m: 4 tensors",
        "\n\x1b[34mcopied\x1b[0m: 1 ",
    ):
        assert text in f"\n{coloured}"
    for code in ("\x1b[33m", "\x1b[32m", "\x1b[34m", "\x1b[31m", "\x1b[0m"):
        coloured = coloured.replace(code, "")
    assert coloured == plain
