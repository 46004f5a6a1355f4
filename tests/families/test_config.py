"""What a config says about the text tower and the stored weights, across the ways in which configs are nested."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from polymerge.checkpoints.bounds import EXPERTS, HEADS
from polymerge.families import FAMILIES, family_of, quantization_method, splits, text_config, text_tower
from polymerge.families.resolve import Stack
from tiny_classless import config_of, sizes_of
from tiny_configs import CLASSLESS, decoder
from tiny_trees import TREES


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({}, None),
        # 4 goes by the nested flag, 5 in some families by the outer one: what is stored decides
        ({"text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": False}, None),
        ({"thinker_config": {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}}, None),
        ({"thinker_config": {"tie_word_embeddings": True, "text_config": {}}}, True),
        # transformers 4 wrote the nested flag
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"text_config": {"tie_word_embeddings": False}}, False),
        # transformers 5 writes both, and ties by the outer one
        ({"text_config": {"tie_word_embeddings": False}, "tie_word_embeddings": True}, True),
        ({"llm_config": {"tie_word_embeddings": True}}, True),
        ({"llm_config": {}, "tie_word_embeddings": None}, None),
    ],
)
def test_one_flag_is_enough_to_tie(config: dict[str, Any], said: bool | None) -> None:
    assert text_tower(config).ties_head is said


@pytest.mark.parametrize("kind", [name for name, family in FAMILIES.items() if family.defaults])
def test_sizes_left_out_are_those_of_transformers(kind: str) -> None:
    said, defaults = AutoConfig.for_model(kind).get_text_config(), dict(FAMILIES[kind].defaults)
    assert {key: getattr(said, key) for key in defaults} == {
        key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()
    }
    if FAMILIES[kind].parts == ("text",):
        tower = text_tower({"model_type": "llava", "text_config": {"model_type": kind, "vocab_size": 99}})
        implied = (defaults["num_hidden_layers"], defaults["hidden_size"])
        assert (tower.model_type, tower.layers, tower.hidden_size, tower.vocab_size) == (kind, *implied, 99)


def test_a_family_s_own_defaults_come_before_those_of_its_decoder() -> None:
    tower = text_tower({"model_type": "mllama", "text_config": {"model_type": "mllama_text_model"}})
    assert (tower.model_type, tower.layers, tower.hidden_size, tower.vocab_size) == ("llama", 32, 4096, 128256)


MLLAMA = {"model_type": "mllama_text_model", "num_hidden_layers": 6, "cross_attention_layers": [4, 1]}


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_layers_between_those_of_the_decoder_are_counted_apart(prefix: str) -> None:
    family = family_of({"model_type": "mllama", "text_config": MLLAMA})
    names = [family.canonical(f"{prefix}layers.{layer}.mlp.up_proj.weight") for layer in range(7)]
    assert names == [
        ("text.layers.0.mlp.up_proj.weight",),
        ("projector.cross_layers.0.mlp.up_proj.weight",),
        ("text.layers.1.mlp.up_proj.weight",),
        ("text.layers.2.mlp.up_proj.weight",),
        ("projector.cross_layers.1.mlp.up_proj.weight",),
        ("text.layers.3.mlp.up_proj.weight",),
        ("text.layers.4.mlp.up_proj.weight",),
    ]
    assert family == family_of({"architectures": ["odd"], "text_config": MLLAMA}, "mllama")
    assert text_tower({"model_type": "mllama", "text_config": MLLAMA}).layers == 4


@pytest.mark.parametrize("listed", [[], "1,4", {"1": 4}, [None, "1", True, 1.0]])
def test_without_a_list_of_layers_all_are_the_decoder_s(listed: Any) -> None:
    text = MLLAMA | {"cross_attention_layers": listed}
    family = family_of({"model_type": "mllama", "text_config": text})
    assert family.canonical("language_model.model.layers.1.w") == ("text.layers.1.w",)
    assert text_tower({"model_type": "mllama", "text_config": text}).layers == 6


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
        ({"model_type": "internvl_chat", "llm_config": {}}, None),
        ({"model_type": "llava_qwen", "architectures": []}, "qwen2"),
        ({"model_type": "idefics3", "text_config": {}}, "llama"),
        ({"model_type": "qwen3_vl_moe", "text_config": {"model_type": "qwen3_vl_moe_text"}}, "qwen3_moe"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "gemma3_text"),
        ({"model_type": "paligemma", "text_config": {"model_type": "gemma2"}}, "gemma2"),
        ({"model_type": "phi3_v", "architectures": ["Phi3VForCausalLM"]}, "phi3"),
        ({"model_type": "multi_modality", "language_config": {"model_type": "llama"}}, "llama"),
        (
            {"model_type": "qwen2_5_omni", "thinker_config": {"text_config": {"model_type": "qwen2_5_omni_text"}}},
            "qwen2",
        ),
        # a decoder that no table knows is called what its config calls it
        ({"model_type": "llava", "text_config": {"model_type": "falcon"}}, "falcon"),
        ({"model_type": "bert"}, "bert"),
        ({}, None),
    ],
)
def test_the_lineage_of_the_text_tower(config: dict[str, Any], kind: str | None) -> None:
    assert text_tower(config).model_type == kind


@pytest.mark.parametrize(("family", "text"), [(family, text) for family in CLASSLESS for text in TREES[family]])
def test_the_configs_of_families_without_a_class_say_what_is_fused(family: str, text: str) -> None:
    tree = TREES[family][text]
    config = config_of(tree, decoder(tree.kind, layers=3, rows=72, tie=False), "bfloat16")
    tower, sizes = text_tower(config), sizes_of(tree, config)
    assert (tower.layers, tower.hidden_size, tower.vocab_size, tower.ties_head) == (3, 32, 72, False)
    assert tower.model_type == (None if family == "minicpm_v" else tree.kind)
    q, k, inner = sizes.queries, sizes.keys, sizes.inner
    assert splits(config)["qkv"] == (((0, q),), ((q, q + k),), ((q + k, q + 2 * k),))
    assert splits(config)["halves" if family == "molmo" else "gate_up"] == (((0, inner),), ((inner, 2 * inner),))


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
    assert splits(config)["qkv"] == tuple((block,) for block in rows)


def test_heads_that_share_keys_lie_beside_them_in_internlm2() -> None:
    rows = splits({"hidden_size": 12, "num_attention_heads": 6, "num_key_value_heads": 2})["wqkv"]
    assert rows == (((0, 6), (10, 16)), ((6, 8), (16, 18)), ((8, 10), (18, 20)))
    assert "wqkv" not in splits({"hidden_size": 12, "num_attention_heads": 6, "num_key_value_heads": 4})


def test_the_width_of_the_mlp_says_where_gate_and_up_lie() -> None:
    rows = splits({"intermediate_size": 6})
    assert rows == {"gate_up": (((0, 6),), ((6, 12),)), "halves": (((0, 3),), ((3, 6),))}


@pytest.mark.parametrize("config", [{}, {"hidden_size": 12}, {"num_attention_heads": 3}, {"num_attention_heads": "3"}])
def test_without_heads_no_rows_are_split(config: dict[str, Any]) -> None:
    assert not any(isinstance(split, tuple) for split in splits(config).values())


@pytest.mark.parametrize("count", ["num_experts", "num_local_experts"])
def test_the_width_of_the_model_says_where_experts_lie(count: str) -> None:
    found = splits({"text_config": {"hidden_size": 6, count: 4}})
    assert found == {"experts_in": Stack(4, columns=6), "experts_out": Stack(4, rows=6)}
    assert splits({"hidden_size": 6})["experts_in"] == Stack(None, columns=6)


def test_the_text_config_is_nested_or_flat() -> None:
    flat = {"model_type": "qwen2", "num_hidden_layers": 3}
    assert text_config(flat) is flat
    assert text_config({"text_config": flat}) is flat
    assert text_config({"llm_config": flat}) is flat
    assert text_config({"language_config": flat}) is flat
    assert text_config({"thinker_config": {"text_config": flat}}) is flat
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


@pytest.mark.parametrize("key", ["num_attention_heads", "num_key_value_heads"])
def test_heads_beyond_any_model_are_no_length_of_a_list(key: str) -> None:
    config = {"model_type": "internlm2", "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": 2}
    found = splits(config)["wqkv"]
    assert isinstance(found, tuple)
    assert [len(ranges) for ranges in found] == [HEADS] * 3
    beyond = splits(config | {key: 10**9})
    assert all(len(ranges) <= HEADS for ranges in beyond.get("wqkv", ()) if isinstance(beyond["wqkv"], tuple))


def test_experts_beyond_any_model_are_no_length_of_a_list() -> None:
    config = {"model_type": "mixtral", "num_local_experts": 10**9, "hidden_size": 2}
    found = splits(config)["experts_in"]
    assert isinstance(found, Stack)
    assert found.experts is None
    assert found.ways((EXPERTS, 4, 2), 2)
    assert not found.ways((EXPERTS + 1, 4, 2), 2)


@pytest.mark.parametrize("size", [2**40 + 1, 10**300, -1, True, 2.0, "3"])
def test_what_is_no_size_is_unspecified(size: object) -> None:
    tower = text_tower({"model_type": "llama", "num_hidden_layers": size, "hidden_size": size, "vocab_size": size})
    assert (tower.layers, tower.hidden_size, tower.vocab_size) == (None, None, None)
