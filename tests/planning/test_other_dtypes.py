"""Tensors that nobody calculates with: carried through a copy as they are, refused by name where they would merge."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from running import cli, linear, merged, raw, recipe_file

PACKED = {
    "F8_E4M3": (torch.uint8, (4, 6), 24),
    "F8_E5M2": (torch.uint8, (4, 6), 24),
    "I8": (torch.int8, (4, 6), 24),
    "I32": (torch.int32, (4, 2), 32),
    "U8": (torch.uint8, (5,), 5),
    "BOOL": (torch.bool, (3, 1), 3),
    "F4": (torch.uint8, (4, 3), 6),
    "F6_E2M3": (torch.uint8, (4, 3), 9),
    "I64": (torch.int64, (), 8),
}


def with_packed(folder: Path, dtype: str, seed: int) -> Path:
    """A Llama of one merged and one packed tensor, written by hand, since torch has not all of these dtypes."""
    _, shape, size = PACKED[dtype]
    generator = torch.Generator().manual_seed(seed)
    norm = torch.randn(8, generator=generator).bfloat16().view(torch.uint8).numpy().tobytes()
    packed = bytes(torch.randint(0, 2 if dtype == "BOOL" else 256, (size,), generator=generator).tolist())
    header = {
        "model.norm.weight": {"dtype": "BF16", "shape": [8], "data_offsets": [0, 16]},
        "model.layers.0.packed": {"dtype": dtype, "shape": list(shape), "data_offsets": [16, 16 + size]},
    }
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + norm + packed)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.mark.parametrize("dtype", PACKED)
def test_packed_tensors_are_carried_through_byte_by_byte(dtype: str, tmp_path: Path) -> None:
    one, other = with_packed(tmp_path / "one", dtype, 1), with_packed(tmp_path / "other", dtype, 2)
    out = merged(linear(one, other, exclude=["text.layers.0.packed"]), tmp_path / "out", "--no-verify")
    assert raw(out)["model.layers.0.packed"] == raw(one)["model.layers.0.packed"]
    assert raw(out)["model.norm.weight"] != raw(one)["model.norm.weight"]


@pytest.mark.parametrize("dtype", PACKED)
def test_packed_tensors_are_refused_by_name_where_they_would_merge(dtype: str, tmp_path: Path) -> None:
    one, other = with_packed(tmp_path / "one", dtype, 1), with_packed(tmp_path / "other", dtype, 2)
    ran = cli("merge", recipe_file(linear(one, other), tmp_path / "r.yaml"), "-o", tmp_path / "out")
    assert ran.status == 2
    assert f"'one' holds it as {dtype}, which cannot be merged" in ran.err
    assert "text.layers.{i}.packed" in ran.err
    assert not (tmp_path / "out").exists()
