"""What a config says about the text tower and the stored weights, across the ways in which configs are nested."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from polymerge.families import quantization_method, splits, text_config, text_tower
from polymerge.families.config import DEFAULTS


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({}, None),
        # transformers 4 wrote the nested flag, and the outer one where it is false
        ({"text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": False}, True),
        ({"text_config": {"tie_word_embeddings": False}}, False),
        # transformers 5 writes both, and ties by the outer one
        ({"text_config": {"tie_word_embeddings": False}, "tie_word_embeddings": True}, True),
        ({"llm_config": {"tie_word_embeddings": True}}, True),
        ({"llm_config": {}, "tie_word_embeddings": None}, None),
    ],
)
def test_one_flag_is_enough_to_tie(config: dict[str, Any], said: bool | None) -> None:
    assert text_tower(config).ties_head is said


@pytest.mark.parametrize("kind", DEFAULTS)
def test_sizes_left_out_are_those_of_transformers(kind: str) -> None:
    defaults = AutoConfig.for_model(kind)
    assert {key: getattr(defaults, key) for key in DEFAULTS[kind]} == DEFAULTS[kind]
    tower = text_tower({"model_type": "llava", "text_config": {"model_type": kind, "vocab_size": 99}})
    assert (tower.model_type, tower.layers, tower.hidden_size, tower.vocab_size) == (kind, 32, 4096, 99)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "qwen2_vl", "num_hidden_layers": 28}, "qwen2"),
        ({"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2_5_vl_text"}}, "qwen2"),
        ({"model_type": "llava", "text_config": {}}, "llama"),
        ({"model_type": "idefics2", "text_config": {}}, "mistral"),
        ({"model_type": "internvl_chat", "llm_config": {"model_type": "internlm2"}}, "internlm2"),
        ({"model_type": "mistral"}, "mistral"),
        # one model type for all decoders: the architecture says which
        ({"model_type": "llava", "architectures": ["LlavaQwenForCausalLM"]}, "qwen2"),
        ({"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}, "llama"),
        ({"architectures": ["CogVLMForCausalLM"]}, "llama"),
        ({"model_type": "mplug_owl2", "architectures": ["MPLUGOwl2LlamaForCausalLM"]}, "llama"),
        ({"model_type": "minicpmv", "architectures": ["MiniCPMV"]}, None),
        ({}, None),
    ],
)
def test_the_lineage_of_the_text_tower(config: dict[str, Any], kind: str | None) -> None:
    assert text_tower(config).model_type == kind


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        ({"hidden_size": 12, "num_attention_heads": 3}, [(0, 12), (12, 24), (24, 36)]),
        # queries share keys and values, under the names of transformers and of CogVLM2
        ({"hidden_size": 12, "num_attention_heads": 6, "num_key_value_heads": 2}, [(0, 12), (12, 16), (16, 20)]),
        ({"hidden_size": 12, "num_attention_heads": 6, "num_multi_query_heads": 3}, [(0, 12), (12, 18), (18, 24)]),
        # heads as wide as the config says
        ({"hidden_size": 12, "num_attention_heads": 2, "head_dim": 5}, [(0, 10), (10, 20), (20, 30)]),
        ({"text_config": {"hidden_size": 4, "num_attention_heads": 2}}, [(0, 4), (4, 8), (8, 12)]),
    ],
)
def test_the_heads_say_which_rows_are_fused(config: dict[str, Any], rows: list[tuple[int, int]]) -> None:
    assert splits(config) == {"qkv": tuple((block,) for block in rows)}


@pytest.mark.parametrize("config", [{}, {"hidden_size": 12}, {"num_attention_heads": 3}, {"num_attention_heads": "3"}])
def test_without_heads_nothing_is_split(config: dict[str, Any]) -> None:
    assert splits(config) == {}


def test_the_text_config_is_nested_or_flat() -> None:
    flat = {"model_type": "qwen2", "num_hidden_layers": 3}
    assert text_config(flat) is flat
    assert text_config({"text_config": flat}) is flat
    assert text_config({"llm_config": flat}) is flat
    assert text_tower({"model_type": "llama", "vocab_size": "many"}).vocab_size is None


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"bits": 4}}, "unknown"),
        ({"quantization_config": None}, None),
        ({"quantization_config": {}}, None),
    ],
)
def test_quantized_weights_are_recognised(config: dict[str, Any], method: str | None) -> None:
    assert quantization_method(config) == method
