"""Whether two tensors have the same bits."""

from __future__ import annotations

from typing import Any

import torch


def same_bits(model: Any, other: Any) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.contiguous().view(torch.uint8), theirs[name].contiguous().view(torch.uint8)), name
