"""What polymerge writes is what vLLM serves: the same tokens as transformers', for checkpoints and for merged LoRAs."""

from __future__ import annotations

from pathlib import Path

import pytest

import served
from environments import environment
from polymerge import verify_with

pytestmark = environment("vllm")


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("family", served.FAMILIES)
def test_a_merged_checkpoint(family: str, tmp_path: Path, vllm: str) -> None:
    found = verify_with(served.merged_checkpoint(family, tmp_path), "vllm", environment=vllm)
    assert found.passed, str(found)
    assert "4 prompts (1 with an image)" in str(found)


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("family", served.FAMILIES)
def test_a_merged_adapter(family: str, tmp_path: Path, vllm: str) -> None:
    found = verify_with(served.merged_adapter(family, tmp_path), "vllm", environment=vllm)
    assert found.passed, str(found)
    assert "4 prompts (1 with an image)" in str(found)


@pytest.mark.usefixtures("warm")
def test_names_of_memory_are_refused(tmp_path: Path, vllm: str) -> None:
    found = verify_with(served.under_names_of_memory(served.build("llava", tmp_path / "vlm")), "vllm", environment=vllm)
    assert not found.passed
    assert "no module or parameter named" in str(found)
    assert "names: published" in str(found)


def test_an_adapter_with_a_projector_is_refused_and_folded_served(tmp_path: Path, vllm: str) -> None:
    adapter = served.merged_adapter("llava", tmp_path, projector=True)
    refused = verify_with(adapter, "vllm", environment=vllm)
    assert not refused.passed
    assert "polymerge fold" in str(refused)
    folded = served.folded(adapter, tmp_path / "folded")
    assert verify_with(folded, "vllm", environment=vllm).passed
