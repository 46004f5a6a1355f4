"""Which table a config asks for."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from polymerge.families import FAMILIES, family_of, registry, tables


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "internvl_chat", "llm_config": {"model_type": "internlm2"}}, "internvl_chat"),
        ({"architectures": ["InternVLChatModel"], "llm_config": {}}, "internvl_chat"),
        ({"model_type": "llava_next_video", "text_config": {"model_type": "mistral"}}, "llava_next"),
        ({"model_type": "smolvlm", "architectures": ["SmolVLMForConditionalGeneration"]}, "idefics3"),
        ({"model_type": "qwen2_5_omni", "architectures": ["Qwen2_5OmniModel"]}, "qwen2_5_omni"),
        ({"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}, "gemma3_text"),
        # the first LLaVA, and OneVision as lmms-lab published it: transformers' model type, other names
        ({"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}, "llava_original"),
        ({"model_type": "llava", "architectures": ["LlavaQwenForCausalLM"]}, "llava_original"),
        # CogVLM's config has no model type
        ({"architectures": ["CogVLMForCausalLM"]}, "cogvlm"),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForRewardModel"]}, "generic"),
        ({"model_type": "bert"}, "generic"),
        ({"model_type": "qwen2", "architectures": []}, "qwen2"),
        ({"model_type": "qwen2", "architectures": None}, "qwen2"),
        ({"model_type": ["odd"], "architectures": [3]}, "generic"),
        ({}, "generic"),
    ],
)
def test_the_config_decides_the_family(config: dict[str, Any], name: str) -> None:
    assert family_of(config).name == name


def test_each_family_claims_its_own() -> None:
    tables = list(FAMILIES.values())
    claims = [claim for family in tables for claim in (*family.model_types, *family.architectures)]
    assert len(claims) == len(set(claims))
    assert all(family.title for family in tables)


def test_every_table_is_found_and_no_two_have_one_name() -> None:
    written = [
        found
        for file in Path(tables.__path__[0]).glob("*.py")
        for found in re.findall(r'Family\(\s*"(\w+)"', file.read_text(encoding="utf-8"))
    ]
    assert len(written) == len(set(written))
    assert {*written, "generic"} == set(FAMILIES)
    assert list(FAMILIES)[-1] == "generic"


def test_a_table_in_a_new_file_is_found_without_another_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = "from polymerge.families.rules import Family, Rule\n"
    (tmp_path / "toys.py").write_text(rules + 'TOY = Family("toy", rules=(Rule("{rest}", "text.{rest}"),))\n')
    monkeypatch.setattr(tables, "__path__", [*tables.__path__, str(tmp_path)])
    assert {family.name for family in registry._tables()} == {*FAMILIES, "toy"} - {"generic"}
    monkeypatch.delitem(sys.modules, f"{tables.__name__}.toys")
