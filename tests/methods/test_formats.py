"""Numbers read and written in the formats of files, by both sets of kernels, against exact arithmetic."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch

from polymerge.methods import kernels

FLOATS = [np.float32, np.float64]
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
WIDTH = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("out", FLOATS)
def test_every_half_is_read_and_written_back(dtype, out):
    patterns = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.from_numpy(patterns.view(np.int16)).view(TORCH[dtype]).to(torch.float64).numpy()
    finite = np.isfinite(expected)
    for choice, all_finite in ((finite, True), (np.ones_like(finite), False)):
        raw = patterns[choice].view(np.uint8)
        for as_block in (np.asarray, torch.from_numpy):
            values = np.empty(choice.sum(), out)
            assert kernels.decode(as_block(raw), dtype, as_block(values)) is all_finite
            np.testing.assert_array_equal(values, expected[choice])
            back = np.empty_like(raw)
            assert kernels.encode(as_block(values), dtype, as_block(back)) is all_finite
            infinite, missing = int(np.isinf(values).sum()), int(np.isnan(values).sum())
            assert kernels.not_finite(back, dtype) == (infinite, missing)
            numbers = ~np.isnan(values)
            np.testing.assert_array_equal(back.view(np.uint16)[numbers], patterns[choice][numbers])
            again = torch.from_numpy(back.view(np.int16)).view(TORCH[dtype])
            np.testing.assert_array_equal(torch.isnan(again).numpy(), ~numbers)


@pytest.mark.parametrize("place", [0, 5, 63, 64, 1000])
@pytest.mark.parametrize("dtype", WIDTH)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_bad_value_is_found(dtype, place, bad):
    values = torch.full((1001,), -1.75, dtype=TORCH[dtype])
    values[place] = bad
    raw = values.view(torch.uint8).numpy()
    assert not kernels.decode(raw, dtype, np.empty(1001, np.float32))
    assert not kernels.decode(raw, dtype, np.empty(1001, np.float64))
    for wide in FLOATS:
        for as_block in (np.asarray, torch.from_numpy):
            numbers = values.to(torch.float64).numpy().astype(wide)
            assert not kernels.encode(as_block(numbers), dtype, as_block(np.empty(1001 * WIDTH[dtype], np.uint8)))


@pytest.mark.parametrize("dtype", ["F32", "F64"])
@pytest.mark.parametrize("out", FLOATS)
def test_wide_formats(dtype, out):
    values = np.random.default_rng(1).normal(0, 1, 1000).astype({"F32": np.float32, "F64": np.float64}[dtype])
    for as_block in (np.asarray, torch.from_numpy):
        read, back = np.empty(1000, out), np.empty(1000 * WIDTH[dtype], np.uint8)
        assert kernels.decode(as_block(values.view(np.uint8)), dtype, as_block(read)) is True
        np.testing.assert_array_equal(read, values.astype(out))
        kernels.encode(as_block(read), dtype, as_block(back))
        np.testing.assert_array_equal(back.view(values.dtype), values.astype(out).astype(values.dtype))


def test_what_is_too_large_becomes_infinite():
    for as_block in (np.asarray, torch.from_numpy):
        out = np.empty(8, np.uint8)
        kernels.encode(as_block(np.array([1e300, -1e39])), "F32", as_block(out))
        assert out.view(np.float32).tolist() == [math.inf, -math.inf]
        assert not kernels.decode(as_block(np.array([1e300]).view(np.uint8)), "F64", as_block(np.empty(1, np.float32)))


def round_half_even(value, fraction_bits, least_exponent, greatest):
    """Rounding as IEEE 754 defines it, in exact arithmetic on Python's integers."""
    if value == 0 or not math.isfinite(value):
        return value
    exponent = max(math.frexp(value)[1] - 1, least_exponent)
    scaled, unit = math.ldexp(1.0, -(exponent - fraction_bits)), math.ldexp(1.0, exponent - fraction_bits)
    numerator, denominator = value.as_integer_ratio()
    times, over = scaled.as_integer_ratio()
    whole, rest = divmod(abs(numerator) * times, denominator * over)
    half = 2 * rest - denominator * over
    whole += half > 0 or (half == 0 and whole % 2 == 1)
    rounded = math.inf if whole * unit > greatest else whole * unit
    return math.copysign(rounded, value)


IEEE = {"BF16": (7, -126, 3.3895313892515355e38), "F16": (10, -14, 65504.0)}


@pytest.mark.parametrize("dtype", IEEE)
@pytest.mark.parametrize("source", FLOATS)
def test_narrowing_rounds_once_to_nearest_even(dtype, source):
    rng = np.random.default_rng(5)
    patterns = rng.integers(0, 1 << 16, 1500, dtype=np.uint16)
    near = torch.from_numpy(patterns.view(np.int16)).view(TORCH[dtype]).to(torch.float64).numpy()
    near = near[np.isfinite(near)]
    halfway = near * (1 + 2.0 ** -(IEEE[dtype][0] + 1))
    values = np.concatenate([near, halfway, halfway * (1 + 2.0**-45), halfway * (1 - 2.0**-45), near * 3.14])
    values = np.concatenate([values, [65519.999, 65520.0, 65536.0, 1e5, 2.0**-25, 2.0**-25 * 1.0001, 2.0**-150]])
    with np.errstate(over="ignore"):
        values = values.astype(source)
    expected = [round_half_even(float(value), *IEEE[dtype]) for value in values]
    for as_block in (np.asarray, torch.from_numpy):
        out = np.empty(values.size * 2, np.uint8)
        assert kernels.encode(as_block(values), dtype, as_block(out)) == all(map(math.isfinite, expected))
        assert kernels.not_finite(out, dtype) == (sum(map(math.isinf, expected)), 0)
        got = torch.from_numpy(out.view(np.int16)).view(TORCH[dtype]).to(torch.float64).numpy()
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("dtype", "least"), [("BF16", 3.3961775292304601e38), ("F16", 65520.0)])
@pytest.mark.parametrize("source", FLOATS)
def test_the_least_number_that_becomes_infinite(dtype, least, source):
    for sign in (1, -1):
        for number, fits in ((np.nextafter(source(least), source(0)), True), (source(least), False)):
            for as_block in (np.asarray, torch.from_numpy):
                out = np.empty(33 * 2, np.uint8)
                values = np.ones(33, source)
                values[17] = sign * number
                assert kernels.encode(as_block(values), dtype, as_block(out)) is fits
                assert kernels.not_finite(out, dtype) == (0 if fits else 1, 0)


def test_bits_are_those_of_the_format():
    """The other tests would not notice if everything was read the wrong way round."""
    raw = np.frombuffer(struct.pack("<4H", 0x3F80, 0xC040, 0x0001, 0x8000), np.uint8)
    out = np.empty(4, np.float32)
    assert kernels.decode(raw, "BF16", out)
    assert out.tolist() == [1.0, -3.0, 2.0**-133, 0.0]


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0"])
@pytest.mark.parametrize("precision", [np.float32, np.float64])
def test_every_code_of_fp8_is_the_number_that_torch_reads(dtype, precision):
    known = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}
    raw = np.arange(256, dtype=np.uint8)
    wanted = torch.from_numpy(raw).view(known[dtype]).float().numpy()
    numbers = np.isfinite(wanted)
    for as_block in (np.asarray, torch.from_numpy):
        out = np.empty(256, precision)
        assert not kernels.decode(as_block(raw), dtype, as_block(out))
        np.testing.assert_array_equal(out[numbers], wanted[numbers])
        np.testing.assert_array_equal(np.signbit(out[numbers]), np.signbit(wanted[numbers]))
        out = np.empty(numbers.sum(), precision)
        assert kernels.decode(as_block(raw[numbers]), dtype, as_block(out))
