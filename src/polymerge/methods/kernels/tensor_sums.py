"""Sums over the elements of torch tensors, in the order in which the loops of `cpu` take them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polymerge.methods.kernels.cpu import divergence
from polymerge.methods.kernels.cpu.arithmetic import CELL, LANES

__all__ = ["divergences", "dots", "magnitudes"]


def dots(x: Tensor, size: int = CELL) -> NDArray[np.float64]:
    """See `polymerge.methods.kernels.dots`."""
    rows = _in_lanes(x, size)
    result = np.empty((rows.shape[1], len(x), len(x)), np.float64)
    for one in range(len(x)):
        for other in range(one, len(x)):
            result[:, one, other] = result[:, other, one] = _folded(rows[one] * rows[other]).cpu().numpy()
    return result


def magnitudes(x: Tensor, size: int) -> NDArray[np.float64]:
    """See `polymerge.methods.kernels.magnitudes`."""
    return torch.stack([_folded(row.abs()) for row in _in_lanes(x, size)], dim=1).cpu().numpy()


def divergences(base: Tensor, deltas: Tensor, width: int) -> NDArray[np.float64]:
    """See `polymerge.methods.kernels.divergences`."""
    theirs = base.to(torch.float64)
    found = [_divergence((theirs + delta).view(-1, width), theirs.view(-1, width)) for delta in deltas]
    return torch.stack(found).cpu().numpy()


def _divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    own, other = (_exp(x - x.max(dim=1, keepdim=True).values) for x in (ours, theirs))
    own, other = (x / _row_sums(x).unsqueeze(1) + divergence.FLOOR for x in (own, other))
    return _row_sums(own * _log(own / other)).clamp_(min=0)


def _exp(x: Tensor) -> Tensor:
    x = x.clamp(min=-divergence.MOST)
    power = x * divergence.LOG2E + divergence.ROUNDING
    whole = power - divergence.ROUNDING
    rest = (x - whole * divergence.LN2_HIGH) - whole * divergence.LN2_LOW
    total = torch.full_like(x, divergence.EXP[0])
    for factor in divergence.EXP[1:]:
        total = total * rest + factor
    return total * ((power.view(torch.int64) + 1023) << 52).view(torch.float64)


def _log(x: Tensor) -> Tensor:
    bits = x.view(torch.int64)
    power = ((bits >> 52) - 1023).to(torch.float64)
    part = ((bits & divergence.FRACTION) | divergence.UNIT).view(torch.float64)
    high = part > divergence.SQRT2
    part, power = torch.where(high, part * 0.5, part), torch.where(high, power + 1.0, power)
    s = (part - 1.0) / (part + 1.0)
    square = s * s
    total = torch.full_like(x, divergence.LOG[0])
    for factor in divergence.LOG[1:]:
        total = total * square + factor
    return power * divergence.LN2_HIGH + (power * divergence.LN2_LOW + 2.0 * s * total)


def _row_sums(x: Tensor) -> Tensor:
    """The sum of each row of a matrix in float64, in the order of `dots`."""
    return _folded(_in_lanes(x.reshape(1, -1), x.shape[1])[0])


def _in_lanes(x: Tensor, size: int) -> Tensor:
    """The rows of `x` [model, n] in float64, cut into cells of `size`, and these into runs: [model, cell, run, lane].

    What is missing is zero. Lanes that would all be zero are left out: to fold them changes nothing.
    """
    models, n = x.shape
    lanes = min(LANES, 1 << (size - 1).bit_length())
    cells, runs = -(-n // size), -(-size // lanes)
    wide = torch.zeros((models, cells * size), dtype=torch.float64, device=x.device)
    wide[:, :n] = x
    filled = torch.zeros((models, cells, runs * lanes), dtype=torch.float64, device=x.device)
    filled[:, :, :size] = wide.view(models, cells, size)
    return filled.view(models, cells, runs, lanes)


def _folded(values: Tensor) -> Tensor:
    """The sums of cells [cell, run, lane]: run after run, and then the upper half of the lanes onto the lower."""
    lanes = torch.zeros_like(values[:, 0])
    for run in values.unbind(1):
        lanes += run
    width = lanes.shape[1]
    while width > 1:
        width //= 2
        lanes = lanes[:, :width] + lanes[:, width:]
    return lanes[:, 0]
