"""Models that a family's table holds for beside what `tiny.build` makes of it: other names, decoders, parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

from running import cli, merged, raw, recipe_file
from tiny import build, family_in, generate, load, related_llm
from tiny_configs import HIDDEN, PIXTRAL, ROWS, config_of, decoder, vision
from whole_merges import average, check_fates, in_memory, literal_merge, recipe, same

MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
TALKER = {
    "embedding_size": HIDDEN, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40, "rope_parameters": MROPE,
}  # fmt: skip
DIFFUSION = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8, "emb_dim": 8, "mel_dim": 8,
    "enc_emb_dim": 8, "enc_dim": 8, "enc_channels": [8, 8, 8, 8, 24], "enc_attention_channels": 4, "num_embeds": 9,
    "enc_se_channels": 4, "look_ahead_layers": [0], "look_backward_layers": [0],
}  # fmt: skip
VOCODER = {
    "mel_dim": 8, "upsample_initial_channel": 16, "upsample_rates": [2], "upsample_kernel_sizes": [4],
    "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3, 5]],
}  # fmt: skip


def model_of(kind: str, text: str, settings: dict[str, Any], folder: Path) -> Path:
    """Write a model of images whose config is of another type than its family's name."""
    family = "idefics3" if kind == "smolvlm" else kind
    build(family, folder, text=text)  # for what lies beside the weights
    said = {**vision(family), **settings}
    config = AutoConfig.for_model(kind, text_config=decoder(text, 2, ROWS, False), tie_word_embeddings=False, **said)
    torch.manual_seed(3)
    AutoModelForImageTextToText.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def check(vlm: Path, llm: Path, tmp_path: Path) -> Path:
    """Merge and hold the result against a literal merge in memory; its folder."""
    made = json.loads(cli("plan", recipe_file(recipe(vlm, llm), tmp_path / "recipe.yaml"), "--json", "-").out)
    out = merged(recipe(vlm, llm), tmp_path / "out")
    check_fates(made, {0: vlm, 1: llm}, out)
    literal = literal_merge(vlm, llm, tmp_path / "literal")
    assert same(in_memory(out), in_memory(literal))
    assert not same(in_memory(out), in_memory(vlm))
    return out


def test_smolvlm_is_an_idefics3(tmp_path: Path) -> None:
    vlm = model_of("smolvlm", "llama", {}, tmp_path / "vlm")
    assert json.loads((vlm / "config.json").read_text())["architectures"] == ["SmolVLMForConditionalGeneration"]
    out = check(vlm, related_llm(vlm, tmp_path / "llm", seed=1), tmp_path)
    assert not torch.equal(generate(out, tokens=1), generate(vlm, tokens=1))


def test_pixtral_is_a_llava_with_a_mistral_and_eyes_of_its_own(tmp_path: Path) -> None:
    vlm = model_of("llava", "mistral", {"vision_config": PIXTRAL}, tmp_path / "vlm")
    assert any("vision_tower.transformer.layers.0.attention" in name for name in load(vlm))
    check(vlm, related_llm(vlm, tmp_path / "llm", seed=1), tmp_path)


@pytest.mark.parametrize(
    ("family", "text"),
    [
        # LLaVA 1.6 with a Mistral and with a Qwen, PaliGemma 2, InternVL 3.5
        ("llava_next", "mistral"),
        ("llava_next", "qwen2"),
        ("paligemma", "gemma2"),
        ("internvl", "qwen3"),
        ("internvl", "qwen3_moe"),
    ],
)
def test_a_family_takes_the_decoders_that_it_has_been_published_with(family: str, text: str, tmp_path: Path) -> None:
    vlm = build(family, tmp_path / "vlm", text=text)
    llm = related_llm(vlm, tmp_path / "llm", seed=1)
    assert family_in(llm) == text
    out = check(vlm, llm, tmp_path)
    assert not torch.equal(generate(out, tokens=1), generate(vlm, tokens=1))


def test_all_of_qwen_omni_keeps_its_voice(tmp_path: Path) -> None:
    whole, llm = tmp_path / "omni", build("qwen2", tmp_path / "llm", seed=1)
    thinker = config_of("qwen2_5_omni", decoder("qwen2", 2, ROWS, False)).to_dict()
    spoken = {"dit_config": DIFFUSION, "bigvgan_config": VOCODER}
    config = Qwen2_5OmniConfig(thinker_config=thinker, talker_config=TALKER, token2wav_config=spoken)
    torch.manual_seed(3)
    Qwen2_5OmniForConditionalGeneration(config).save_pretrained(whole)
    torch.save({"Chelsie": {"bos_token": 1, "cond": torch.zeros(1, 8)}}, whole / "spk_dict.pt")

    said = recipe(whole, llm)
    made = json.loads(cli("plan", recipe_file(said, tmp_path / "recipe.yaml"), "--json", "-").out)
    out = merged(said, tmp_path / "out")
    check_fates(made, {0: whole, 1: llm}, out)
    before, after, theirs = load(whole), load(out), load(llm)
    expected: dict[str, Tensor] = dict(before)
    for name, tensor in theirs.items():
        own = f"thinker.{name}"
        expected[own] = average(before[own], tensor)
    assert same(after, expected)
    assert (raw(out)["talker.thinker_to_talker_proj.weight"]) == raw(whole)["talker.thinker_to_talker_proj.weight"]
    # without its voices the class refuses to load
    loaded = Qwen2_5OmniForConditionalGeneration.from_pretrained(out)
    assert list(loaded.speaker_map) == ["Chelsie"]
