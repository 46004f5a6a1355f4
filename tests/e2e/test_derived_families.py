"""A sample of the families without a table: merged with a fine-tune and with the language model that they grew from.

`benchmarks/families.py` walks over all of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import polymerge
import tiny_derived
from derived_walk import opened, pairs

SAMPLE = ("qwen3_5", "qwen3_5_moe", "gemma4", "glm4v", "minicpmv4_6", "lfm2_vl", "kimi_k25", "llama4", "blip-2",
          "cohere2_vision", "granite_speech", "ovis2")  # fmt: skip


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_family_without_a_table_is_merged_to_the_last_tensor(kind: str, tmp_path: Path) -> None:
    named = tiny_derived.multimodal_types()[kind]
    found = list(pairs(kind, named, tmp_path))
    for number, pair in enumerate(found):
        assert pair.question is not None
        pair.check(tmp_path / f"out{number}")
    assert found[0].name == "VLM + VLM"
    assert len(found) == 3


@pytest.mark.parametrize(("kind", "text"), [("mistral3", "ministral3"), ("internvl", "qwen3"), ("llava", "olmo2")])
def test_a_table_s_text_tower_and_a_derived_one_are_joined(kind: str, text: str, tmp_path: Path) -> None:
    """The decoder is of another lineage than those that the table lists."""
    named = tiny_derived.multimodal_types()[kind]
    config = tiny_derived.tiny_config(kind, text=text)
    *_, found = pairs(kind, named, tmp_path, config)
    assert found.name == f"VLM + {text}"
    found.check(tmp_path / "out")


def test_what_transformers_does_not_load_is_the_template_s(tmp_path: Path) -> None:
    kind, named = "qwen3_5", "Qwen3_5ForConditionalGeneration"
    config = tiny_derived.tiny_config(kind)
    one, two = (tiny_derived.build(config, tmp_path / name, seed=seed, class_name=named)
                for seed, name in enumerate(("one", "two")))  # fmt: skip
    for folder, names in ((one, ("mtp.fc.weight", "mtp.norm.weight")), (two, ("mtp.fc.weight", "mtp.head.weight"))):
        file = folder / "model.safetensors"
        save_file(load_file(file) | {name: torch.full((3,), 2.5) for name in names}, file, metadata={"format": "pt"})
    recipe = {"merge_method": "linear", "models": [{"model": str(folder), "parameters": {"weight": 0.5}}
                                                   for folder in (one, two)]}  # fmt: skip
    plan = polymerge.plan(recipe)
    why = "transformers does not load it, so it is never merged"
    assert {step.name: step.reason for step in plan.steps if step.fate == "copied"} == dict.fromkeys(
        ("mtp.fc.weight", "mtp.norm.weight"), why
    )
    assert {(left.name, left.reason) for left in plan.left_out} == {("mtp.fc.weight", why), ("mtp.head.weight", why)}
    polymerge.merge(recipe, tmp_path / "out")
    loaded = getattr(transformers, named)
    ours, theirs, made = (opened(loaded, folder).state_dict() for folder in (one, two, tmp_path / "out"))
    assert all(torch.allclose(tensor, 0.5 * ours[name] + 0.5 * theirs[name]) for name, tensor in made.items())
    assert load_file(tmp_path / "out" / "model.safetensors")["mtp.fc.weight"].eq(2.5).all()


def test_a_language_model_may_have_the_names_of_its_multimodal_class(tmp_path: Path) -> None:
    """As fine-tunes of text alone are published that were trained inside the multimodal class."""
    *_, pair = pairs("qwen3_5", "Qwen3_5ForConditionalGeneration", tmp_path)
    file = pair.other / "model.safetensors"
    renamed = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    pair.check(tmp_path / "out")
