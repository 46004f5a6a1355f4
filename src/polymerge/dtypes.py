"""Element types by their safetensors names: their width, and which ones can be merged."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from types import MappingProxyType
from typing import Final

__all__ = ["BITS", "FP8", "MERGEABLE", "NAMES", "byte_count", "dtype_code", "dtype_name", "holding", "holds"]

BITS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "F64": 64, "F32": 32, "F16": 16, "BF16": 16,
        "I64": 64, "I32": 32, "I16": 16, "I8": 8,
        "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
        "C64": 64, "C128": 128,
        "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
        "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    }
)  # fmt: skip
"""Bits of one element, by safetensors dtype."""

MERGEABLE: Final = ("F64", "F32", "F16", "BF16")
"""The dtypes that support arithmetic; others can only be copied."""

FP8: Final = ("F8_E4M3", "F8_E5M2")
"""The dtypes of weights that are numbers only times their scales."""

NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
)
"""The values of `dtype` in a recipe, with their safetensors names."""


def dtype_code(name: str) -> str | None:
    """The safetensors dtype for a recipe's `dtype` (`bfloat16` -> `BF16`), or None if unknown."""
    return NAMES.get(name)


def dtype_name(code: str) -> str:
    """The name of one of `MERGEABLE` in recipes and configs (`BF16` -> `bfloat16`)."""
    return next(name for name, known in NAMES.items() if known == code)


def holds(dtype: str, other: str) -> bool:
    """Return whether `dtype` can represent every value of the dtype `other`; both are among `MERGEABLE`."""
    return dtype == other or dtype == "F64" or (dtype == "F32" and other != "F64")


def holding(dtypes: Collection[str]) -> str:
    """The narrowest dtype that can represent all of the given ones, from `MERGEABLE`: F32 for F16 with BF16."""
    return next(code for code in reversed(MERGEABLE) if all(holds(code, other) for other in dtypes))


def byte_count(dtype: str, shape: tuple[int, ...]) -> int:
    """Size of a contiguous tensor in bytes; raises ValueError if it is not an integer (packed 4 and 6 bit types)."""
    bits = BITS[dtype] * prod(shape)
    if bits % 8:
        raise ValueError(f"{dtype} {list(shape)} does not fill whole bytes")
    return bits // 8
