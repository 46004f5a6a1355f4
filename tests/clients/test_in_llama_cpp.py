"""What llama.cpp makes of polymerge's outputs: text, projector and merged LoRAs, with the tokens of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

import served
from environments import environment
from polymerge import verify_with

pytestmark = [environment("llama.cpp"), pytest.mark.usefixtures("warm")]

WITH_PROJECTOR = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TEXT_ONLY = ("llava",)


@pytest.mark.parametrize("family", WITH_PROJECTOR)
def test_text_and_projector(family: str, tmp_path: Path, llama_cpp: str) -> None:
    found = verify_with(served.merged_checkpoint(family, tmp_path), "llama.cpp", environment=llama_cpp)
    assert found.passed, str(found)
    assert "text and projector as GGUF (f32)" in str(found)


@pytest.mark.parametrize("family", TEXT_ONLY)
def test_text_alone(family: str, tmp_path: Path, llama_cpp: str) -> None:
    found = verify_with(served.merged_checkpoint(family, tmp_path), "llama.cpp", environment=llama_cpp)
    assert found.passed, str(found)
    assert "3 prompts, 48 tokens" in str(found)
    assert "the converter makes no projector" in str(found)


@pytest.mark.parametrize("family", [*WITH_PROJECTOR, *TEXT_ONLY])
def test_a_merged_adapter(family: str, tmp_path: Path, llama_cpp: str) -> None:
    found = verify_with(served.merged_adapter(family, tmp_path), "llama.cpp", environment=llama_cpp)
    assert found.passed, str(found)
    assert "adapter as GGUF" in str(found)
