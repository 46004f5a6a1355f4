"""A sample of the families without a table: merged with a fine-tune and with the language model that they grew from.

`benchmarks/families.py --derived` walks over all of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny_derived
from derived_walk import pairs

SAMPLE = ("qwen3_5", "qwen3_5_moe", "gemma4", "glm4v", "minicpmv4_6", "lfm2_vl", "kimi_k25", "llama4", "blip-2",
          "cohere2_vision", "granite_speech", "ovis2")  # fmt: skip
REFUSED = {("kimi_k25", "VLM + VLM in memory's names")}
"""Queries and keys have their rows in another order in memory than in files: such names are of other tensors."""


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_family_without_a_table_is_merged_to_the_last_tensor(kind: str, tmp_path: Path) -> None:
    named = tiny_derived.multimodal_types()[kind]
    found = [(name, run) for name, run in pairs(kind, named, tmp_path) if (kind, name) not in REFUSED]
    for _, run in found:
        run()
    assert found[0][0] == "VLM + VLM"
    assert len(found) + sum(kind == one for one, _ in REFUSED) == 3
