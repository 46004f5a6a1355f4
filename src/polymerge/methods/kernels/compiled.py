"""Compile loops over numpy arrays, with a typed wrapper of numba's decorator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit, types
from numba.extending import overload

__all__ = ["compiled", "number"]

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile a loop over numpy arrays on its first call, and cache the machine code on disk if possible.

    The order of operations is as written: `fastmath` off means no reordering of sums and no fused
    multiply-add, so that a result does not depend on the processor, and a GPU can be made to agree bit for bit.
    `nogil` lets several threads work at once. `error_model="numpy"` makes x / 0 a value, not a branch to an exception,
    without which a loop that divides would not be vectorised.
    """
    try:
        compiler = njit(cache=True, nogil=True, fastmath=False, error_model="numpy")
        return cast(Function, compiler(function))
    except RuntimeError:  # no folder to keep machine code in, neither beside the source nor in the user's home
        compiler = njit(nogil=True, fastmath=False, error_model="numpy")
        return cast(Function, compiler(function))


def number(element: Any) -> Any:
    """The value of an element in compiled loops: itself, or decoded from BF16 bits."""
    return element


@overload(number, strict=False)  # not strict: a lambda has no annotations
def _number(element: Any) -> Any:
    if isinstance(element, types.Integer):
        return lambda element: np.uint32(np.uint32(element) << 16).view(np.float32)
    return lambda element: element
