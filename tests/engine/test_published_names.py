"""`names: published`: a checkpoint with the names of transformers' memory is written as its family is published, read
back by transformers and by the tables, and its tensors are the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import polymerge
import tiny
import tiny_derived
from folded import learned
from polymerge.families import read_names
from polymerge.families.names_on_disk import as_published
from polymerge.inference.live import LiveModel
from running import cli, linear, raw, same_weights

MADE_OTHERWISE = ("qwen3_moe", "mixtral", "qwen3_vl_moe")
"""Families whose experts lie together in memory, or transposed against published files."""
RENAMED = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "gemma3", "mllama", "internvl",
           "qwen2_audio", "qwen2_5_omni", "deepseek_vl")  # fmt: skip
DERIVED = ("aya_vision", "vipllava", "video_llava", "qianfan_ocr", "granite_speech",
           "glm4v_moe", "qwen3_5_moe", "minimax_m3_vl", "glm5_next", "molmo2",
           "dots3_note", "kimi_k25", "mistral_large4", "step3p7")  # fmt: skip
"""Without a table: of renamed tensors, of towers with a level less in memory, and of fused tensors; of experts that lie
together in memory, in a tower, too, and of convolutions and matrices that lie one below the other there; of queries and
keys whose rows have another order there.
"""


def class_in(folder: Path) -> Any:
    return getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])


def in_memory(folder: Path, out: Path) -> Path:
    """The same model, with all tensors as transformers has them in memory."""
    model = class_in(folder).from_pretrained(folder)
    model.save_pretrained(out, save_original_format=False)
    assert raw(out).keys() == {name for name, _ in model.state_dict().items()} - {*(model.all_tied_weights_keys or {})}
    return out


def built(family: str, folder: Path, seed: int = 0) -> Path:
    """A tiny checkpoint as transformers writes it."""
    if family in DERIVED:
        named = tiny_derived.multimodal_types()[family]
        return tiny_derived.build(tiny_derived.tiny_config(family), folder, seed=seed, class_name=named)
    return tiny.build(family, folder, seed=seed)


def shapes(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    checkpoint = polymerge.plan({"merge_method": "linear", "models": [str(folder)], "parameters": {"weight": 1}})
    (read,) = checkpoint.inputs
    assert read.opened is not None
    return dict(read.opened.config), {name: entry.shape for name, entry in read.opened.entries.items()}


def copied(folder: Path) -> dict[str, Any]:
    return {"merge_method": "copy", "models": [str(folder)], "names": "published"}


@pytest.mark.parametrize("family", [*RENAMED, *MADE_OTHERWISE, *DERIVED])
def test_what_memory_has_is_written_as_published_and_nothing_else_changes(family: str, tmp_path: Path) -> None:
    live = in_memory(built(family, tmp_path / "vlm"), tmp_path / "live")
    out = tmp_path / "out"
    done = polymerge.merge(copied(live), out)
    assert done.plan.counts()["copied"] == len(done.plan.steps)
    config, held = shapes(out)
    found = as_published(config, read_names(config, held), held)
    assert (dict(found.names), found.why) == ({}, "")
    same_weights(class_in(live).from_pretrained(live), class_in(live).from_pretrained(out))
    assert [finding.passed for finding in done.verification.findings].count(False) == 0
    if family not in MADE_OTHERWISE and family not in DERIVED:
        assert sorted(raw(live).values()) == sorted(raw(out).values())


def test_experts_are_cut_out_byte_for_byte(tmp_path: Path) -> None:
    """Numbers that arithmetic would change, such as negative zero, are moved as they are."""
    live = in_memory(built("qwen3_moe", tmp_path / "moe"), tmp_path / "live")
    model = class_in(live).from_pretrained(live)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::3] = -0.0
    model.save_pretrained(live, save_original_format=False)
    out = tmp_path / "out"
    polymerge.merge(copied(live), out, threads=3, block=7)
    prefix = "model.layers.1.mlp.experts."
    whole, held = load_file(live / "model.safetensors")[f"{prefix}gate_up_proj"], load_file(out / "model.safetensors")
    parts = [held[f"{prefix}{expert}.{part}_proj.weight"] for expert in range(len(whole)) for part in ("gate", "up")]
    same = torch.cat(parts).view(whole.shape).view(torch.uint8)
    assert torch.equal(same, whole.view(torch.uint8))


@pytest.mark.parametrize(
    "family",
    ["llava", "qwen2_vl", "qwen3_moe", "qwen3_vl_moe", "qwen3_5_moe", "glm5_next", "kimi_k25", "mistral_large4"],
)
def test_a_merge_has_the_numbers_that_it_has_under_the_template_s_names(family: str, tmp_path: Path) -> None:
    one = in_memory(built(family, tmp_path / "one"), tmp_path / "live")
    other = built(family, tmp_path / "other", seed=1)
    plain, out = tmp_path / "plain", tmp_path / "out"
    recipe = linear(one, other)
    polymerge.merge(recipe, plain)
    done = polymerge.merge(recipe | {"names": "published"}, out)
    assert raw(out).keys() != raw(plain).keys() or family == "qwen3_vl_moe"
    same_weights(class_in(plain).from_pretrained(plain), class_in(plain).from_pretrained(out))
    written = tmp_path / "plan.json"
    written.write_text(json.dumps(done.plan.to_json()))
    polymerge.merge(str(written), tmp_path / "again")
    assert raw(tmp_path / "again") == raw(out)


@pytest.mark.parametrize("family", ["llava", "qwen3_moe"])
def test_a_merge_in_memory_is_the_same(family: str, tmp_path: Path) -> None:
    one = in_memory(built(family, tmp_path / "one"), tmp_path / "live")
    recipe = linear(one, built(family, tmp_path / "other", seed=1)) | {"names": "published"}
    plan = polymerge.plan(recipe)
    model = LiveModel(plan)
    model.set(plan)
    polymerge.merge(plan, tmp_path / "out")
    same_weights(model.model, class_in(one).from_pretrained(tmp_path / "out"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks by the old name
def test_a_folded_adapter(tmp_path: Path) -> None:
    live = in_memory(built("llava", tmp_path / "vlm"), tmp_path / "live")
    learned(live, tmp_path / "adapter")
    plain, out = tmp_path / "plain", tmp_path / "out"
    polymerge.fold(tmp_path / "adapter", plain, base=live)
    assert cli("fold", tmp_path / "adapter", "--base", live, "--names", "published", "-o", out).status == 0
    assert "vision_tower.vision_model.post_layernorm.weight" in raw(out)
    same_weights(class_in(live).from_pretrained(plain), class_in(live).from_pretrained(out))


def test_names_of_a_torch_file_and_of_tied_tensors(tmp_path: Path) -> None:
    tied = in_memory(built("gemma3", tmp_path / "vlm"), tmp_path / "live")
    out = tmp_path / "out"
    done = polymerge.merge(copied(tied), out, file_format="torch")
    assert done.verification is not None
    assert done.verification.passed
    held: dict[str, Tensor] = torch.load(out / "pytorch_model.bin", weights_only=True)
    assert "language_model.model.embed_tokens.weight" in held
