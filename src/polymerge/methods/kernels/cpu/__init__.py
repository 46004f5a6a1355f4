"""The kernels for numpy arrays: loops compiled by numba, which release the GIL while they run."""

from polymerge.methods.kernels.cpu.arithmetic import (
    add_scaled,
    dots,
    elected_sum,
    magnitudes,
    subtract,
    weighted_sum,
)
from polymerge.methods.kernels.cpu.divergence import divergences, scored
from polymerge.methods.kernels.cpu.formats import decode, encode, finite, not_finite, rounded
from polymerge.methods.kernels.cpu.matrices import add_low_rank, times_scales
from polymerge.methods.kernels.cpu.ranking import keep_ranked
from polymerge.methods.kernels.cpu.selection import (
    count_shared,
    keep_between,
    keep_scored,
    limited,
    shared_sum,
    variances,
)
from polymerge.methods.kernels.cpu.trimming import find_cutoffs, keep_largest, keep_random

__all__ = [
    "add_low_rank",
    "add_scaled",
    "count_shared",
    "decode",
    "divergences",
    "dots",
    "elected_sum",
    "encode",
    "find_cutoffs",
    "finite",
    "keep_between",
    "keep_largest",
    "keep_random",
    "keep_ranked",
    "keep_scored",
    "limited",
    "magnitudes",
    "not_finite",
    "rounded",
    "scored",
    "shared_sum",
    "subtract",
    "times_scales",
    "variances",
    "weighted_sum",
]
