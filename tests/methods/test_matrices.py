"""The product of two thin factors, added block by block: the bits of a literal loop, wherever the blocks are cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from polymerge.methods import kernels
from polymerge.methods.kernels.cpu.matrices import TILE

Floats = NDArray[Any]
FLOATS = [np.float32, np.float64]
relaxed = settings(deadline=None, max_examples=60)


def case(seed: int, rows: int, rank: int, width: int, dtype: type) -> tuple[Floats, Floats, Floats]:
    """A matrix and two factors whose products cancel, vanish and swamp one another."""
    rng = np.random.default_rng(seed)
    left, right = rng.normal(0, 1, (rows, rank)), rng.normal(0, 1, (rank, width))
    left *= 10.0 ** rng.integers(-6, 7, rank)
    left[rng.random(left.shape) < 0.1] = 0.0
    right[rng.random(right.shape) < 0.1] = -0.0
    out = rng.normal(0, 1, rows * width)
    out[rng.random(out.shape) < 0.1] = -0.0
    return out.astype(dtype), left.astype(dtype), right.astype(dtype)


def literal(out: Floats, left: Floats, right: Floats, scale: float) -> Floats:
    """One element after another, every operation of it a number of the dtype."""
    dtype = out.dtype.type
    factor, width = dtype(scale), right.shape[1]
    found = []
    for place, element in enumerate(out):
        row, column = divmod(place, width)
        total = dtype(0)
        for k in range(len(right)):
            total = dtype(total + dtype(left[row, k] * right[k, column]))
        found.append(dtype(element + dtype(factor * total)))
    return np.array(found, dtype)


def bits(x: Floats) -> Floats:
    return np.ascontiguousarray(x).view(f"u{x.itemsize}")


def in_blocks(out: Floats, left: Floats, right: Floats, scale: float, cuts: list[int], how: str = "numpy") -> Floats:
    """What the kernel makes of `out`, given to it in the blocks between `cuts`."""
    made = out.copy()
    factors = [left, right] if how == "numpy" else [torch.from_numpy(left), torch.from_numpy(right)]
    for start, stop in pairwise([0, *sorted(cuts), len(out)]):
        block = made[start:stop] if how == "numpy" else torch.from_numpy(made[start:stop])
        kernels.add_low_rank(block, *factors, scale, start)
    return made


@pytest.mark.parametrize("how", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "rank", "width"), [(1, 1, 1), (7, 4, 5), (3, 16, 37), (2, 3, TILE + 9), (40, 2, 1)])
@pytest.mark.parametrize("scale", [1.0, 0.1, -2.5])
def test_every_product_and_every_sum_is_rounded_in_order(
    rows: int, rank: int, width: int, scale: float, dtype: type, how: str
) -> None:
    out, left, right = case(rows * width, rows, rank, width, dtype)
    expected = literal(out, left, right, scale)
    np.testing.assert_array_equal(bits(in_blocks(out, left, right, scale, [], how)), bits(expected))


def test_the_cases_tell_orders_and_precisions_apart() -> None:
    """Were the numbers too tame, a fused or a reordered sum would have the same bits."""
    out, left, right = case(1, 30, 16, 40, np.float32)
    mine = in_blocks(out, left, right, 0.1, [])
    backwards = in_blocks(out, left[:, ::-1].copy(), right[::-1].copy(), 0.1, [])
    wide = (left.astype(np.float64) @ right.astype(np.float64)).ravel()
    once = (out + np.float64(np.float32(0.1)) * wide).astype(np.float32)
    scaled_before = in_blocks(out, left * np.float32(0.1), right, 1.0, [])
    for other in (backwards, once, scaled_before):
        assert (bits(mine) != bits(other)).mean() > 0.05
    np.testing.assert_allclose(mine, once, rtol=1e-4, atol=np.abs(wide).max() * 1e-6)


@relaxed
@given(
    st.integers(0, 999), st.integers(1, 6), st.integers(1, 9), st.sampled_from([1, 3, 17, TILE - 1, TILE, TILE + 1]),
    st.sampled_from(FLOATS), st.sampled_from(["numpy", "torch"]), st.data(),
)  # fmt: skip
def test_no_bit_depends_on_the_blocks(
    seed: int, rows: int, rank: int, width: int, dtype: type, how: str, data: st.DataObject
) -> None:
    out, left, right = case(seed, rows, rank, width, dtype)
    inside = st.integers(1, max(1, rows * width - 1))
    cuts = data.draw(st.sets(inside, max_size=7)) if rows * width > 1 else set()
    whole = in_blocks(out, left, right, 0.7, [])
    np.testing.assert_array_equal(bits(in_blocks(out, left, right, 0.7, list(cuts), how)), bits(whole))


def test_nothing_beside_the_block_is_written() -> None:
    out, left, right = case(3, 5, 2, 11, np.float32)
    buffer = np.full(60, 9, np.float32)
    buffer[20:40] = out[13:33]
    kernels.add_low_rank(buffer[20:40], left, right, 0.5, 13)
    np.testing.assert_array_equal(bits(buffer[20:40]), bits(in_blocks(out, left, right, 0.5, [])[13:33]))
    assert (buffer[:20] == 9).all()
    assert (buffer[40:] == 9).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_scale_is_rounded_to_the_dtype(dtype: type) -> None:
    """A tenth is no number of either dtype; with float32 the one of float32 counts."""
    out, one = np.zeros(1, dtype), np.ones((1, 1), dtype)
    kernels.add_low_rank(out, one, one, 0.1, 0)
    assert out[0] == dtype(0.1)
    assert (float(out[0]) == 0.1) == (dtype is np.float64)


# --- scales of blocks


@given(
    st.integers(1, 9), st.integers(1, 12), st.tuples(st.integers(1, 10), st.integers(1, 13)), st.integers(0, 50),
    st.integers(0, 99),
)  # fmt: skip
@relaxed
def test_scales_multiply_the_blocks_that_they_are_for(
    rows: int, width: int, block: tuple[int, int], first: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 1, (rows, width)).astype(np.float32)
    grid = rng.normal(0, 1, (-(-rows // block[0]), -(-width // block[1]))).astype(np.float32)
    wanted = np.array([[values[i, j] * grid[i // block[0], j // block[1]] for j in range(width)] for i in range(rows)])
    first = min(first, values.size)
    for as_block in (np.asarray, torch.from_numpy):
        out = as_block(values.reshape(-1)[first:].copy())
        assert kernels.times_scales(out, as_block(grid.T.copy()).T, block, width, first)
        np.testing.assert_array_equal(np.asarray(out), wanted.reshape(-1)[first:])


@pytest.mark.parametrize("number", [np.nan, np.inf, 3e38])
def test_products_that_are_not_finite_are_noticed(number: float) -> None:
    values, grid = np.ones(6, np.float32), np.array([[1, 2, 1]], np.float32)
    values[4] = number
    for as_block in (np.asarray, torch.from_numpy):
        assert not kernels.times_scales(as_block(values.copy()), as_block(grid), (2, 1), 3, 0)
