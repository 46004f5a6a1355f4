"""The kernels for numpy arrays: loops compiled by numba, which release the GIL while they run."""

from polymerge.methods.kernels.cpu.arithmetic import add_scaled, dots, elected_sum, subtract, weighted_sum
from polymerge.methods.kernels.cpu.formats import decode, encode, finite, not_finite, rounded
from polymerge.methods.kernels.cpu.matrices import add_low_rank
from polymerge.methods.kernels.cpu.trimming import find_cutoffs, keep_largest, keep_random

__all__ = [
    "add_low_rank",
    "add_scaled",
    "decode",
    "dots",
    "elected_sum",
    "encode",
    "find_cutoffs",
    "finite",
    "keep_largest",
    "keep_random",
    "not_finite",
    "rounded",
    "subtract",
    "weighted_sum",
]
