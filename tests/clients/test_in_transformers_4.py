"""What polymerge writes is what transformers 4 loads, with the tokens of transformers 5."""

from __future__ import annotations

from pathlib import Path

import pytest

import served
from environments import environment
from polymerge import verify_with

pytestmark = [environment("transformers4"), pytest.mark.usefixtures("warm")]

SEEN_HERE = ("llava", "llava_next")
"""The families whose processors need no torchvision, which may be missing beside polymerge."""


@pytest.mark.parametrize("family", served.FAMILIES)
def test_a_merged_checkpoint(family: str, tmp_path: Path, transformers_4: str) -> None:
    found = verify_with(served.merged_checkpoint(family, tmp_path), "transformers", environment=transformers_4)
    assert found.passed, str(found)
    assert "transformers 4.57" in str(found)
    assert "greedy: as transformers 5" in str(found)
    if family in SEEN_HERE:
        assert "4 prompts (1 with an image)" in str(found)


@pytest.mark.parametrize("family", SEEN_HERE)
def test_a_merged_adapter(family: str, tmp_path: Path, transformers_4: str) -> None:
    found = verify_with(served.merged_adapter(family, tmp_path), "transformers", environment=transformers_4)
    assert found.passed, str(found)


def test_names_of_memory_are_not_found(tmp_path: Path, transformers_4: str) -> None:
    live = served.under_names_of_memory(served.build("llava", tmp_path / "vlm"))
    found = verify_with(live, "transformers", environment=transformers_4)
    assert not found.passed
    assert "does not find its tensors" in str(found)
    assert "names: published" in str(found)
