"""Decode and encode numbers in BF16, F16, F32 and F64; decode those in fp8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polymerge.dtypes import BITS, byte_count
from polymerge.methods.kernels.compiled import compiled

__all__ = ["decode", "encode", "finite", "machine_code", "not_finite", "rounded"]

Bytes = NDArray[np.uint8]


def decode(raw: Bytes, dtype: str, out: NDArray[Any]) -> bool:
    """See `polymerge.methods.kernels.decode`."""
    if dtype == "F64" and out.dtype == np.float64:
        return bool(_copy_f64(raw.view(np.uint64), out.view(np.uint64)))
    if dtype == "F64":
        _convert(raw.view(np.float64), out)
        return bool(np.isfinite(out).all())
    if out.dtype == np.float64:  # a narrow tensor among wide ones: every float32 is a float64, so two steps are exact
        narrow = np.empty(out.size, np.float32)
        finite = decode(raw, dtype, narrow)
        _convert(narrow, out)
        return finite
    bits = out.view(np.uint32)
    if dtype == "BF16":
        return bool(_widen_bf16(raw.view(np.uint16), bits))
    if dtype == "F16":
        return bool(_widen_f16(raw.view(np.uint16), bits))
    if dtype == "F8_E4M3":
        return bool(_widen_e4m3(raw, bits))
    if dtype == "F8_E5M2":  # the upper half of a number in F16
        return bool(_widen_f16(raw.astype(np.uint16) << np.uint16(8), bits))
    if dtype == "F8_E8M0":
        bits[:] = np.where(raw == 0, 1 << 22, raw.astype(np.uint32) << 23)  # 2**-127 is subnormal
        return not (raw == 255).any()  # which stands for NaN
    return bool(_copy_f32(raw.view(np.uint32), bits))


def machine_code() -> Path | None:
    """The folder in which numba keeps these loops once they are compiled; None if there is none."""
    kept = getattr(_widen_bf16, "stats", None)  # absent where compilation is switched off (NUMBA_DISABLE_JIT)
    return Path(kept.cache_path) if kept is not None and kept.cache_path else None


def finite(bits: NDArray[np.uint16]) -> bool:
    """See `polymerge.methods.kernels.finite`."""
    return bool(_finite_bf16(bits))


def encode(values: NDArray[Any], dtype: str, out: Bytes) -> bool:
    """See `polymerge.methods.kernels.encode`."""
    if dtype == "F64" or (dtype == "F32" and values.dtype == np.float64):
        wide = out.view(np.float64 if dtype == "F64" else np.float32)
        _convert(values, wide)
        return bool(np.isfinite(wide).all())
    if dtype == "F32":
        return bool(_copy_f32(values.view(np.uint32), out.view(np.uint32)))
    if values.dtype == np.float64:  # by way of float32, without rounding twice
        narrow = np.empty(values.size, np.float32)
        _round_to_odd(values, narrow, narrow.view(np.uint32))
        values = narrow
    narrow_down = _narrow_bf16 if dtype == "BF16" else _narrow_f16
    return bool(narrow_down(values, values.view(np.uint32), out.view(np.uint16)))


def not_finite(raw: Bytes, dtype: str) -> tuple[int, int]:
    """See `polymerge.methods.kernels.not_finite`."""
    values = np.empty(raw.size * 8 // BITS[dtype], np.float64 if dtype == "F64" else np.float32)
    decode(raw, dtype, values)
    return int(np.isinf(values).sum()), int(np.isnan(values).sum())


def _convert(values: NDArray[Any], out: NDArray[Any]) -> None:
    with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaNs are passed on, as IEEE 754 has it
        out[:] = values


# An infinity or NaN has all its exponent bits set, and nothing else has: adding one at the lowest exponent bit carries
# into the place of the sign exactly then. The carries of a whole block are collected with OR, which costs next to
# nothing, and looked at once at the end.


@compiled
def _widen_bf16(raw: NDArray[np.uint16], out: NDArray[np.uint32]) -> bool:
    carries = 0
    for i in range(out.size):
        bits = raw[i] << 16
        out[i] = bits
        carries |= (bits & 0x7F800000) + 0x00800000
    return (carries >> 31) & 1 == 0


@compiled
def _finite_bf16(bits: NDArray[np.uint16]) -> bool:
    carries = np.uint16(0)
    for i in range(bits.size):
        carries |= np.uint16((bits[i] & np.uint16(0x7F80)) + np.uint16(0x0080))
    return bool(carries < 0x8000)


@compiled
def _copy_f32(raw: NDArray[np.uint32], out: NDArray[np.uint32]) -> bool:
    carries = 0
    for i in range(out.size):
        bits = raw[i]
        out[i] = bits
        carries |= (bits & 0x7F800000) + 0x00800000
    return (carries >> 31) & 1 == 0


@compiled
def _copy_f64(raw: NDArray[np.uint64], out: NDArray[np.uint64]) -> bool:
    carries = np.uint64(0)
    for i in range(out.size):
        bits = raw[i]
        out[i] = bits
        carries |= (bits & np.uint64(0x7FF0000000000000)) + np.uint64(0x0010000000000000)
    return bool((carries >> np.uint64(63)) == 0)


@compiled
def _widen_f16(raw: NDArray[np.uint16], out: NDArray[np.uint32]) -> bool:
    carries = 0
    for i in range(out.size):
        magnitude = raw[i] & 0x7FFF
        # 10 fraction bits become 23 and the exponent's bias 15 becomes 127; all ones stay all ones
        normal = (magnitude << 13) + (0x70000000 if magnitude >= 0x7C00 else 0x38000000)
        # a subnormal is a whole number of 2**-24
        subnormal = np.float32(np.float32(magnitude) * np.float32(2.0**-24)).view(np.uint32)
        out[i] = (subnormal if magnitude < 0x0400 else normal) | (raw[i] & 0x8000) << 16
        carries |= magnitude + 0x0400
    return (carries >> 15) & 1 == 0


@compiled
def _widen_e4m3(raw: Bytes, out: NDArray[np.uint32]) -> bool:
    carries = 0
    for i in range(out.size):
        magnitude = raw[i] & 0x7F
        # 3 fraction bits become 23 and the exponent's bias 7 becomes 127; all ones are NaN, and nothing is infinite
        normal = 0x7FC00000 if magnitude == 0x7F else (magnitude << 20) + 0x3C000000
        # a subnormal is a whole number of 2**-9
        subnormal = np.float32(np.float32(magnitude) * np.float32(2.0**-9)).view(np.uint32)
        out[i] = (subnormal if magnitude < 0x08 else normal) | (raw[i] & 0x80) << 24
        carries |= magnitude + 0x01
    return (carries >> 7) & 1 == 0


@compiled
def _narrow_bf16(values: NDArray[np.float32], bits: NDArray[np.uint32], out: NDArray[np.uint16]) -> bool:
    carries = 0
    for i in range(out.size):
        # half a unit less one, plus one if the unit's bit is odd: ties go to even, and a carry goes on to infinity
        rounded = (bits[i] + 0x7FFF + ((bits[i] >> 16) & 1)) >> 16
        out[i] = rounded if values[i] == values[i] else 0x7FC0
        carries |= (bits[i] & 0x7FFFFFFF) + 0x00808000  # 0x7F7F8000 is the least that is rounded to infinity
    return (carries >> 31) & 1 == 0


@compiled
def _narrow_f16(values: NDArray[np.float32], bits: NDArray[np.uint32], out: NDArray[np.uint16]) -> bool:
    carries = 0
    for i in range(out.size):
        magnitude = bits[i] & 0x7FFFFFFF
        if magnitude < 0x38800000:  # below 2**-14, the smallest normal half: a whole number of 2**-24
            half = int(np.rint(abs(values[i]) * np.float32(2.0**24)))
        elif magnitude < 0x47800000:  # below 65536: rounded as for BF16, the bias 127 becomes 15
            half = (magnitude - 0x38000000 + 0x0FFF + ((magnitude >> 13) & 1)) >> 13
        else:
            half = 0x7C00 if magnitude <= 0x7F800000 else 0x7E00
        out[i] = half | (bits[i] >> 16) & 0x8000
        carries |= half + 0x0400
    return (carries >> 15) & 1 == 0


@compiled
def _round_to_odd(values: NDArray[np.float64], out: NDArray[np.float32], bits: NDArray[np.uint32]) -> None:
    """Round float64 so that rounding the result again, to 8 or 11 bits, equals rounding once.

    Values that float32 cannot represent are truncated towards zero with the last bit set, which avoids ties.
    """
    for i in range(out.size):
        value = values[i]
        out[i] = value
        near = np.float64(out[i])
        if near != value:
            bits[i] = (bits[i] - (1 if abs(near) > abs(value) else 0)) | 1


def rounded(x: NDArray[Any], dtype: str) -> NDArray[Any]:
    """See `polymerge.methods.kernels.rounded`."""
    raw = np.empty(byte_count(dtype, x.shape), np.uint8)
    encode(x, dtype, raw)
    decode(raw, dtype, x)
    return x
