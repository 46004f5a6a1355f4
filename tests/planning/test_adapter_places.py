"""Adapters on another model than the one they were trained on: each update lands on its weight, W + scaling * B A."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import polymerge
import tiny
from adapters_made import PEFT_WARNINGS
from layouts import FUSED, Sizes, config_of, random_tower, stored, tower_of
from misplaced import CLOSE, PREFIX, RANK, adapter, factors, raw_tensors
from running import checkpoint, cli, fold
from tiny import build, related_llm
from tiny_configs import CROSS

pytestmark = PEFT_WARNINGS


# --- a text model's adapter on a multimodal model of the same decoder

ON_VLMS = (
    "llava",
    "llava_next",
    "llava_onevision",
    "idefics2",
    "idefics3",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "gemma3",
    "paligemma",
    "mistral3",
    "mllama",
    "qwen2_audio",
    "qwen2_5_omni",
    "deepseek_vl",
)
"""The families whose text tower is stored as a plain decoder's tensors, under names of their own."""

CLASSLESS = ("internvl_chat", "llava_original", "minicpm_v", "cambrian", "deepseek_vl_original")


@pytest.mark.parametrize("family", [*ON_VLMS, *CLASSLESS])
@pytest.mark.parametrize("body", [False, True], ids=["causal", "body"])
def test_a_text_adapter_lands_on_every_vlm_of_its_decoder(family: str, body: bool, tmp_path: Path) -> None:
    base = build(family, tmp_path / "base", dtype="float32")
    llm = load_file(related_llm(base, tmp_path / "llm", seed=1) / "model.safetensors")
    kinds = ("self_attn.q_proj", "mlp.down_proj")
    shapes = {name.removesuffix(".weight"): tuple(tensor.shape) for name, tensor in llm.items()
              if name.removesuffix(".weight").endswith(kinds)}  # fmt: skip
    tensors, updates = factors({module.removeprefix("model.") if body else module: shapes[module] for module in shapes})
    before = raw_tensors(base)
    after = raw_tensors(fold(base, adapter(tmp_path / "adapter", tensors), tmp_path / "out", "--no-verify"))
    landed = {}
    for module, update in updates.items():
        layer, kind = module.partition("layers.")[2].split(".", 1)
        name = text_name(family, int(layer), kind, before)
        landed[name] = before[name].double() + update
    assert len(landed) == len(updates) == 4
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if name in landed:
            torch.testing.assert_close(tensor.double(), landed[name], **CLOSE)
        else:
            assert torch.equal(tensor, before[name]), name


def text_name(family: str, layer: int, kind: str, names: dict[str, Tensor]) -> str:
    """What a family calls a module of its decoder on disk, found by hand: not in a tower, and in its own layer."""
    if family == "mllama":  # layers that look at the image stand between
        layer = [number for number in range(layer + len(CROSS) + 1) if number not in CROSS][layer]
    strangers = ("vis", "vpm", "audio", "perceiver", "resampler", "connector", "vision", "img")
    (found,) = [
        name for name in names
        if name.endswith(f"layers.{layer}.{kind}.weight") and not any(word in name for word in strangers)
    ]  # fmt: skip
    return found


def test_a_plain_model_with_its_adapter_says_what_the_vlm_says(tmp_path: Path) -> None:
    """The logits of a folded VLM are those of its text tower as PEFT has it with the adapter."""
    base = build("llava", tmp_path / "base", dtype="float32")
    vlm, report = tiny.AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    text = AutoModelForCausalLM.from_config(vlm.config.text_config)
    inside = {name.replace("model.language_model.", "model."): tensor for name, tensor in vlm.state_dict().items()}
    text.load_state_dict({name: inside[name] for name in text.state_dict()})
    peft = get_peft_model(text, LoraConfig(r=2, lora_alpha=6, target_modules="all-linear", init_lora_weights=False))
    peft.save_pretrained(tmp_path / "adapter")
    words = torch.tensor([[1, 5, 9, 13, 20]])
    with torch.no_grad():
        want = peft.eval()(input_ids=words).logits
        out = fold(base, tmp_path / "adapter", tmp_path / "out")
        made = tiny.AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
        got = made(input_ids=words).logits
        assert (vlm.eval()(input_ids=words).logits - want).abs().max() > 0.01
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "gemma3"])
def test_factors_of_a_head_are_added_to_the_head_of_the_vlm(family: str, tie: bool, tmp_path: Path) -> None:
    """PEFT saves what lies beneath factors of a head too: that of the language model, which the VLM's is not."""
    base = build(family, tmp_path / "base", dtype="float32", tie=tie)
    llm = related_llm(base, tmp_path / "llm", seed=1)
    lora = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32), lora)
    peft.save_pretrained(tmp_path / "adapter")
    assert f"{PREFIX}lm_head.base_layer.weight" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    update = peft.base_model.model.lm_head.get_delta_weight("default").detach()
    out = fold(base, tmp_path / "adapter", tmp_path / "out")
    was, made = (tiny.open_model(folder, dtype=torch.float32) for folder in (base, out))
    want = was.get_output_embeddings().weight + update
    torch.testing.assert_close(made.get_output_embeddings().weight, want, **CLOSE)
    assert torch.equal(made.get_input_embeddings().weight, was.get_input_embeddings().weight)
    plan = polymerge.plan({"merge_method": "copy", "models": [f"{base}+{tmp_path / 'adapter'}"]})
    assert any("what lay beneath its factors in the model that it was trained on" in one for one in plan.warnings)


def test_biases_beneath_factors_are_trained(tmp_path: Path) -> None:
    base = build("llava_onevision", tmp_path / "base", dtype="float32")
    llm = related_llm(base, tmp_path / "llm", seed=1)
    lora = LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only", init_lora_weights=False)
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32), lora)
    name = "model.layers.1.self_attn.q_proj"
    with torch.no_grad():
        peft.base_model.model.get_submodule(name).base_layer.bias.copy_(torch.arange(32))
    peft.save_pretrained(tmp_path / "adapter")
    made = tiny.open_model(fold(base, tmp_path / "adapter", tmp_path / "out"), dtype=torch.float32).state_dict()
    assert torch.equal(made["model.language_model.layers.1.self_attn.q_proj.bias"], torch.arange(32.0))


def test_rows_of_images_beyond_the_vocabulary_are_said(tmp_path: Path) -> None:
    """Llama 3.2 Vision has eight rows more in its embedding than the language model has that an adapter is of."""
    base = build("mllama", tmp_path / "base", dtype="float32")
    rows = {"model.embed_tokens.weight": torch.zeros(64, 32), "lm_head.weight": torch.zeros(64, 32)}
    learned = adapter(tmp_path / "adapter", rows, modules_to_save=["embed_tokens", "lm_head"])
    ran = cli("fold", learned, "--base", base, "--dry-run")
    assert ran.status == 2
    assert "differ by 8 rows, those of images" in ran.err
    assert "vocab: overlap" in ran.err


# --- modules that are one tensor here and several there

SIZES = Sizes(heads=4, width=6, shared=2, hidden=24, inner=10)
KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "self_attn.o_proj")


@pytest.mark.parametrize("layout", [*FUSED, "cogvlm", "mplug_owl2"])
def test_split_modules_land_in_the_rows_of_fused_ones(layout: str, tmp_path: Path) -> None:
    """And in those of the text tokens where a model has image tokens' own beside them."""
    tower = random_tower(SIZES, seed=1, dtype=torch.float32)
    tensors = {name: tensor.clone() for name, tensor in stored(layout, tower, SIZES).items()}
    base = checkpoint(tmp_path / "base", tensors, config_of(layout, SIZES))
    modules = {f"layers.{layer}.{kind}": SIZES.shape(f"{kind}.weight") for layer in (0, 1) for kind in KINDS}
    tensors, updates = factors({f"model.{module}": shape for module, shape in modules.items()})
    out = fold(base, adapter(tmp_path / "adapter", tensors), tmp_path / "out", "--no-verify")
    found = tower_of(layout, raw_tensors(out), SIZES)
    assert set(found) >= set(tower)
    for name, tensor in found.items():
        update = updates.get(f"model.{name.removesuffix('.weight')}")
        if update is None:
            assert torch.equal(tensor, tower[name.removesuffix("@image")]), name
        else:
            torch.testing.assert_close(tensor.double(), tower[name].double() + update, **CLOSE)


def test_fused_modules_land_on_each_of_the_split_ones(tmp_path: Path) -> None:
    tower = random_tower(SIZES, seed=1, dtype=torch.float32)
    base = checkpoint(tmp_path / "base", stored("llama", tower, SIZES), config_of("llama", SIZES))
    rows = SIZES.queries + 2 * SIZES.keys
    tensors, updates = factors(
        {"model.layers.1.self_attn.qkv_proj": (rows, 24), "model.layers.0.mlp.gate_up_proj": (20, 24)}
    )
    found = tower_of(
        "llama", raw_tensors(fold(base, adapter(tmp_path / "adapter", tensors), tmp_path / "out", "--no-verify")), SIZES
    )
    qkv, mlp = updates.values()
    parts = dict(zip("qkv", qkv.split([SIZES.queries, SIZES.keys, SIZES.keys]), strict=True))
    landed = {f"layers.1.self_attn.{part}_proj.weight": update for part, update in parts.items()}
    landed |= dict(zip(("layers.0.mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight"), mlp.split(10), strict=True))
    for name, tensor in found.items():
        if name in landed:
            torch.testing.assert_close(tensor.double(), tower[name].double() + landed[name], **CLOSE)
        else:
            assert torch.equal(tensor, tower[name]), name


# --- bare bodies, and heads for other tasks


def test_adapters_of_bare_bodies_and_on_them(tmp_path: Path) -> None:
    base = build("qwen2", tmp_path / "base", dtype="float32")
    body = AutoModel.from_pretrained(base, dtype=torch.float32)
    body.save_pretrained(tmp_path / "body")
    settings = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    peft = get_peft_model(body, settings)
    peft.save_pretrained(tmp_path / "of body")
    after = peft.merge_and_unload().state_dict()
    made = raw_tensors(fold(base, tmp_path / "of body", tmp_path / "out"))
    was = raw_tensors(base)
    for name, tensor in after.items():
        torch.testing.assert_close(made[f"model.{name}"], tensor, **CLOSE)
    assert sum(not torch.equal(made[name], was[name]) for name in was) == 4
    causal = {name.replace(PREFIX, f"{PREFIX}model."): tensor
              for name, tensor in load_file(tmp_path / "of body" / "adapter_model.safetensors").items()}  # fmt: skip
    config = json.loads((tmp_path / "of body" / "adapter_config.json").read_text())
    named = {name.removeprefix(PREFIX): tensor for name, tensor in causal.items()}
    learned = adapter(tmp_path / "causal", named, **{key: config[key] for key in ("r", "lora_alpha")})
    on_body = raw_tensors(fold(tmp_path / "body", learned, tmp_path / "out 2", "--no-verify"))
    for name, tensor in after.items():
        torch.testing.assert_close(on_body[name], tensor, **CLOSE)


def test_a_reward_head_is_left_out_by_name_where_the_base_has_none(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype="float32")
    reward = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    peft = get_peft_model(
        reward, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="SEQ_CLS")
    )
    peft.save_pretrained(tmp_path / "adapter")
    after = peft.merge_and_unload().state_dict()
    ran = cli("fold", tmp_path / "adapter", "--base", base, "-o", tmp_path / "out")
    assert ran.status == 0, ran.err
    assert "'adapter/base_model.model.score.weight' in its file is left out: is a head for another task" in ran.err
    made, was = raw_tensors(tmp_path / "out"), raw_tensors(base)
    assert made.keys() == was.keys()
    for name in was:
        torch.testing.assert_close(made[name], after.get(name, was[name]), **CLOSE)
    record = json.loads((tmp_path / "out" / "polymerge.json").read_text())
    assert any("score.weight" in row[1] and "another task" in row[2] for row in record["plan"]["left_out"])


# --- several adapters


def test_adapters_of_a_text_model_and_of_a_vlm_merge_by_what_they_change(tmp_path: Path) -> None:
    base = build("qwen3_vl", tmp_path / "base", dtype="float32")
    module, shape = (
        "layers.1.self_attn.q_proj",
        raw_tensors(base)["model.language_model.layers.1.self_attn.q_proj.weight"].shape,
    )
    of_vlm, one = factors({f"model.language_model.{module}": tuple(shape)}, seed=1)
    of_llm, other = factors({f"model.{module}": tuple(shape)}, seed=2)
    adapters = [adapter(tmp_path / "vlm", of_vlm), adapter(tmp_path / "llm", of_llm)]
    recipe = {"merge_method": "linear", "models": [str(one) for one in adapters], "base_model": str(base),
              "parameters": {"weight": 0.5, "rank": 2 * RANK}}  # fmt: skip
    made = polymerge.merge(recipe, tmp_path / "merged", check=False)
    out = raw_tensors(fold(base, made.folder, tmp_path / "out", "--no-verify"))
    name, was = f"model.language_model.{module}.weight", raw_tensors(base)
    want = was[name].double() + (next(iter(one.values())) + next(iter(other.values()))) / 2
    torch.testing.assert_close(out[name].double(), want, rtol=1e-5, atol=1e-5)
    assert [key for key in was if not torch.equal(out[key], was[key])] == [name]


def test_what_a_base_is_without_is_said(tmp_path: Path) -> None:
    """A VLM's adapter on a language model: nothing of its vision tower is taken for text."""
    base = build("llama", tmp_path / "base", dtype="float32")
    q, width = raw_tensors(base)["model.layers.0.self_attn.q_proj.weight"].shape
    modules = {"model.language_model.layers.0.self_attn.q_proj": (q, width),
               "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj": (q, width)}  # fmt: skip
    ran = cli("fold", adapter(tmp_path / "adapter", factors(modules)[0]), "--base", base, "--dry-run")
    assert ran.status == 2
    assert "1 problem" in ran.err
    assert (
        "has weights for model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight, which its base"
        in ran.err
    )
    assert "family llama) does not have: it is a model without vision. Name a base that has one" in ran.err


def test_a_bias_of_layers_that_have_none_is_said(tmp_path: Path) -> None:
    """And lands in those that have one, as the queries of Qwen2."""
    for family in ("llama", "qwen2"):
        base = build(family, tmp_path / family, dtype="float32")
        settings = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], lora_bias=True, init_lora_weights=False)
        peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
        peft.save_pretrained(tmp_path / f"of {family}")
        if family == "qwen2":
            after = peft.merge_and_unload().state_dict()
    ran = cli("fold", tmp_path / "of llama", "--base", tmp_path / "llama", "--dry-run")
    assert ran.status == 2
    assert "1 problem" in ran.err
    assert "model.layers.0.self_attn.q_proj.bias" in ran.err
    assert "lora_bias gives a bias to layers that have none" in ran.err
    made = raw_tensors(fold(tmp_path / "qwen2", tmp_path / "of qwen2", tmp_path / "out"))
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, after[name], **CLOSE)
