"""The kernels against plain loops, and the two sets of kernels against each other, bit for bit."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from literal_methods import elected
from polymerge.methods import kernels
from polymerge.methods.kernels.cpu.trimming import philox

FLOATS = [np.float32, np.float64]

relaxed = settings(deadline=None, max_examples=40)


def deltas(seed, models, n, dtype=np.float32):
    """Numbers as task vectors have them: many magnitudes, many equals, many zeros of either sign."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (models, n))
    x[:, ::3] = np.round(x[:, ::3] * 2) / 4
    x[rng.random((models, n)) < 0.1] = 0.0
    x[rng.random((models, n)) < 0.1] = -0.0
    return x.astype(dtype)


def bits(x):
    x = np.ascontiguousarray(kernels.on_host(x))
    return x.view(f"u{x.itemsize}")


def both(function, *blocks, **others):
    """Call a kernel with numpy arrays and with tensors; the results have to have the same bits. Gives the array."""
    mine = function(*(block.copy() for block in blocks), **others)
    theirs = function(*(torch.from_numpy(block.copy()) for block in blocks), **others)
    np.testing.assert_array_equal(bits(mine), bits(theirs))
    return mine


def test_torch_is_not_imported_for_arrays():
    code = (
        "import sys; import numpy as np; from polymerge.methods.sums import linear;"
        "linear(np.ones((2, 4), np.float32), 1.0); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- sums


@relaxed
@given(st.integers(0, 99), st.integers(1, 5), st.integers(1, 3000), st.sampled_from(FLOATS))
def test_weighted_sum_rounds_every_product_and_every_sum_in_order(seed, models, n, dtype):
    x, weight = deltas(seed, models, n, dtype), np.random.default_rng(seed).normal(0, 1, models).tolist()
    expected = x[0] * dtype(weight[0])
    for row, share in zip(x[1:], weight[1:], strict=True):
        expected = expected + row * dtype(share)
    np.testing.assert_array_equal(bits(both(kernels.weighted_sum, x, weight=weight)), bits(expected))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1.0, 0.3, -2.0])
def test_subtract_and_add_scaled(dtype, scale):
    x, base = deltas(1, 3, 700, dtype), deltas(2, 1, 700, dtype)[0]
    np.testing.assert_array_equal(both(kernels.subtract, x, base), x - base)
    merged = both(kernels.add_scaled, base, x[0], scale=scale)
    np.testing.assert_array_equal(bits(merged), bits(base + x[0] * dtype(scale)))
    if scale == 1:
        np.testing.assert_array_equal(bits(merged), bits(base + x[0]))


@pytest.mark.parametrize("elect", ["weighted", "unweighted"])
@pytest.mark.parametrize("normalize", ["weight", "count", "none"])
@pytest.mark.parametrize("models", [1, 2, 3, 6])
def test_elected_sum_is_the_papers(elect, normalize, models):
    x = deltas(models, models, 2500, np.float64)
    weight = [0.9, 0.2, -0.3, 1.0, 0.0, 0.25][:models]
    got = both(kernels.elected_sum, x, weight=weight, elect=elect, normalize=normalize)
    expected = elected(list(x), weight, elect, normalize)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-300)
    both(kernels.elected_sum, x.astype(np.float32), weight=weight, elect=elect, normalize=normalize)


@pytest.mark.parametrize("elect", ["weighted", "unweighted"])
@pytest.mark.parametrize("normalize", ["weight", "count", "none"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_loop_for_two_models_has_the_bits_of_the_general_one(elect, normalize, dtype):
    x = deltas(8, 2, 3000, dtype)
    x[:, :500] *= dtype(1e-30) * dtype(1e-8)  # products that vanish
    with_a_silent_third = np.vstack([x, np.zeros((1, 3000), dtype)])
    for weight in ([0.9, 0.2], [0.5, -0.5], [1e-9, 1e-9], [1e-20, 1.0]):
        two = both(kernels.elected_sum, x, weight=weight, elect=elect, normalize=normalize)
        three = kernels.elected_sum(with_a_silent_third, [*weight, 1.0], elect, normalize)
        np.testing.assert_array_equal(bits(two), bits(three))


@pytest.mark.parametrize("n", [1, 1000, 65536, 65537, 200000])
@pytest.mark.parametrize("dtype", FLOATS)
def test_dots(n, dtype):
    x = deltas(n, 3, n, dtype)
    cells = kernels.dots(x.copy())
    np.testing.assert_array_equal(cells, kernels.dots(torch.from_numpy(x)))
    assert cells.shape == (-(-n // kernels.CELL), 3, 3)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(cells.sum(axis=0), wide @ wide.T, rtol=1e-12, atol=1e-9)
    blocks = [kernels.dots(x[:, start : start + kernels.CELL]) for start in range(0, n, kernels.CELL)]
    np.testing.assert_array_equal(np.concatenate(blocks), cells)


@pytest.mark.parametrize("width", [1, 7, 600, 2500])
@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_of_rows(width, dtype):
    x = deltas(width, 2, 6 * width, dtype)
    sums = kernels.magnitudes(x, width)
    np.testing.assert_array_equal(sums, kernels.magnitudes(torch.from_numpy(x), width))
    np.testing.assert_allclose(sums, np.abs(x.astype(np.float64)).reshape(2, 6, width).sum(axis=2).T, rtol=1e-12)
    np.testing.assert_array_equal(kernels.dots(x, width), kernels.dots(torch.from_numpy(x), width))


@pytest.mark.parametrize("width", [1, 7, 600, 2500])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [0.02, 3.0, 400.0])
def test_divergences_of_rows(width, dtype, size):
    base, x = deltas(1, 1, 6 * width, dtype)[0] * dtype(size), deltas(2, 2, 6 * width, dtype) * dtype(size / 9)
    x[0, :width] = 0
    found = kernels.divergences(base, x, width)
    np.testing.assert_array_equal(found, kernels.divergences(torch.from_numpy(base), torch.from_numpy(x), width))
    logits = [np.tile(base, (2, 1)).astype(np.float64) + x, np.tile(base, (2, 1)).astype(np.float64)]
    rows = [each.reshape(2, 6, width) for each in logits]
    powers = [np.exp(each - each.max(axis=2, keepdims=True)) for each in rows]
    p, q = (each / each.sum(axis=2, keepdims=True) + 1e-8 for each in powers)
    np.testing.assert_allclose(found, (p * np.log(p / q)).sum(axis=2), rtol=1e-9, atol=1e-14)
    assert found[0, 0] == 0
    scores = both(kernels.scored, x, per_row=found, width=width)
    expected = np.abs(x).reshape(2, 6, width) * found.astype(dtype)[:, :, None]
    np.testing.assert_array_equal(scores, expected.reshape(x.shape))


# ---- trimming


@relaxed
@given(st.integers(0, 99), st.integers(1, 300), st.sampled_from(FLOATS), st.floats(0, 1))
def test_cutoffs_keep_the_largest_and_what_is_equal_to_the_least_of_them(seed, n, dtype, share):
    x, keep = deltas(seed, 2, n, dtype), int(share * n)
    expected = np.zeros_like(x)
    for row, out in zip(x, expected, strict=True):
        chosen = sorted((abs(one) for one in row), reverse=True)[:keep]
        for i in range(n):
            if abs(row[i]) in chosen:
                out[i] = row[i]
    cutoffs = kernels.find_cutoffs(x, [keep, keep])
    assert cutoffs == kernels.find_cutoffs(torch.from_numpy(x), [keep, keep])
    np.testing.assert_array_equal(both(kernels.keep_largest, x, cutoffs=cutoffs), expected)


def test_a_cutoff_keeps_every_equal_wherever_it_lies():
    x = np.array([[1, -2, 2, 3, -2, 2, 0]], np.float32)
    for keep, kept in ((0, []), (1, [3]), (2, [-2, 2, 3, -2, 2]), (5, [-2, 2, 3, -2, 2]), (6, [1, -2, 2, 3, -2, 2])):
        found = kernels.find_cutoffs(x, [keep])
        whole = both(kernels.keep_largest, x, cutoffs=found)
        assert whole[whole != 0].tolist() == kept
        for at in range(8):
            parts = [kernels.keep_largest(part.copy(), found) for part in (x[:, :at], x[:, at:])]
            np.testing.assert_array_equal(np.hstack(parts), whole)


def plain_philox(counter, key, rounds=10):
    """Philox4x32 as figure 2 of the paper draws it, on Python's integers."""
    a, b, c, d = counter
    key_0, key_1 = key
    for _ in range(rounds):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (right >> 32) ^ b ^ key_0, right % 2**32, (left >> 32) ^ d ^ key_1, left % 2**32
        key_0, key_1 = (key_0 + 0x9E3779B9) % 2**32, (key_1 + 0xBB67AE85) % 2**32
    return a, b, c, d


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_plain_philox_has_the_known_answers_of_random123(counter, key, words):
    numbers = [[int(word, 16) for word in line.split()] for line in (counter, key, words)]
    assert list(plain_philox(*numbers[:2])) == numbers[2]


def word_of(element, key):
    counter = element // 4
    return plain_philox((counter % 2**32, counter >> 32, 0, 0), (key % 2**32, key >> 32))[element % 4]


@relaxed
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**50), st.integers(1, 40))
def test_compiled_philox_is_the_plain_one(key, counter, count):
    out = np.empty(4 * count, np.uint32)
    philox(np.uint64(counter), np.uint64(key), out)
    assert out.tolist() == [word_of(4 * counter + i, key) for i in range(4 * count)]


@relaxed
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.floats(0, 1), st.booleans(), st.sampled_from(FLOATS))
def test_keep_random_looks_at_one_word_per_element(key, start, density, rescale, dtype):
    x = deltas(key % 97, 1, 70, dtype)
    got = both(kernels.keep_random, x, keys=[key], start=start, density=[density], rescale=rescale)
    factor = dtype(1 / density) if rescale and density >= 2**-32 else dtype(1)
    kept = [word_of(start + i, key) < math.floor(density * 2**32) for i in range(70)]
    np.testing.assert_array_equal(bits(got), bits(np.where(kept, x * factor, dtype(0))))


@pytest.mark.parametrize("cuts", [(1, 2, 3), (4096, 5000), (4095, 8193)])
def test_draws_do_not_depend_on_blocks(cuts):
    x = deltas(3, 2, 10000)
    arguments = {"keys": [1, 2**63 + 5], "density": [0.3, 0.7], "rescale": True}
    whole = both(kernels.keep_random, x, start=0, **arguments)
    edges = [0, *cuts, 10000]
    parts = [kernels.keep_random(x[:, a:b].copy(), start=a, **arguments) for a, b in pairwise(edges)]
    np.testing.assert_array_equal(np.hstack(parts), whole)


def test_draws_have_the_density_and_differ_between_keys():
    x = np.ones((3, 100000), np.float32)
    kernels.keep_random(x, [0, 1, 2], 0, [0.2, 0.2, 0.9], False)
    np.testing.assert_allclose(x.mean(axis=1), [0.2, 0.2, 0.9], atol=0.006)
    np.testing.assert_allclose((x[0] * x[1]).mean(), 0.04, atol=0.004)


# ---- memory


def test_rows_of_a_longer_buffer_give_the_same_bits():
    buffer = np.full((4, 5000), np.nan, np.float32)
    x = buffer[:3, :2049]
    x[:] = deltas(4, 3, 2049)
    own = x.copy()
    np.testing.assert_array_equal(kernels.weighted_sum(x, [1, 2, 3]), kernels.weighted_sum(own, [1, 2, 3]))
    for rows in (2, 3):
        mine, theirs = (kernels.elected_sum(y[:rows], [1] * rows, "weighted", "count") for y in (x, own))
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(kernels.dots(x), kernels.dots(own))
    assert np.isnan(buffer[:, 2049:]).all()
    with pytest.raises(ValueError, match="contiguous"):
        kernels.weighted_sum(buffer[:, ::2], [1] * 4)
