"""Blocks of pieces whose rows come from several files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from polymerge.checkpoints.safetensors import read_safetensors
from polymerge.engine.blocks import PieceBlocks, Workspace
from polymerge.engine.device import open_device
from polymerge.engine.extents import Files
from polymerge.errors import CheckpointError
from polymerge.families.expressions import Concat, Read
from polymerge.planning import Piece


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("where", [(0, "q"), (0, "k"), (1, "k")])
def test_what_is_not_finite_is_told_with_its_own_file_and_model(
    dtype: torch.dtype, where: tuple[int, str], tmp_path: Path
) -> None:
    entries = []
    for model in range(2):
        held = {}
        for name in ("q", "k"):
            numbers = torch.arange(40).reshape(8, 5).to(dtype)
            if (model, name) == where:
                numbers[6, 2] = torch.inf
            file = tmp_path / f"{model}-{name}.safetensors"
            save_file({name: numbers}, file)
            held |= {one.name: one for one in read_safetensors(file)}
        entries.append(held)
    joined = Concat((Read("q"), Read("k")))
    piece = Piece("qk", ((0, 16),), setting=0, reads=(joined, joined))
    workspace = Workspace(open_device("cpu"))
    with Files() as files:
        blocks = PieceBlocks(piece, ["one", "two"], entries, files, workspace, 80, wide=False)
        with pytest.raises(CheckpointError) as error:
            blocks.read(0)
    model, name = where
    assert str(error.value).startswith(
        f"{tmp_path}/{model}-{name}.safetensors: qk of '{('one', 'two')[model]}' holds NaN"
    )
