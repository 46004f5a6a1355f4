"""Low-rank updates as pairs of factors, against dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from low_rank import adapters, dense
from polymerge.errors import RecipeError
from polymerge.methods.cat import cat, svd
from polymerge.methods.factors import Factors, check_shapes, decompose, of_dense, pad, stack, truncate

few = settings(max_examples=20)
seeds = st.integers(0, 999)


def best(matrix, rank):
    """The best approximation, and the share of the norm that it loses."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    kept = (u[:, :rank] * s[:rank]) @ v[:rank]
    whole = np.linalg.norm(s)
    return kept, np.linalg.norm(s[rank:]) / whole if whole else 0.0


def close(got, wanted, steps=16):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=steps * 2.0**-24 * max(np.abs(wanted).max(), 1e-30))


# --- sums


@few
@given(seeds, st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_a_stack_is_the_weighted_sum(seed, weight):
    pairs = adapters(seed)
    merged = stack(pairs, weight)
    assert merged.rank == 8
    assert merged.b.dtype == merged.a.dtype == np.float32
    np.testing.assert_array_equal(merged.a, np.concatenate([pair.a for pair in pairs]))
    bound = sum(abs(w) * np.abs(p.b).astype(float) @ np.abs(p.a) for w, p in zip(weight, pairs, strict=True))
    error = np.abs(dense(merged) - sum(w * dense(p) for w, p in zip(weight, pairs, strict=True)))
    assert (error <= 2.0**-23 * bound + 1e-40).all()


def test_weight_one_changes_nothing():
    pair = adapters(0)[0]
    for merged in (stack([pair], [1.0]), cat([pair], 1.0), svd([pair], [3.0], normalize=True)):
        np.testing.assert_array_equal(merged.b, pair.b)
        np.testing.assert_array_equal(merged.a, pair.a)


@pytest.mark.parametrize("method", [cat, svd])
def test_equal_adapters_average_to_themselves(method):
    pair = adapters(1)[0]
    close(dense(method([pair, pair, pair], [1.0, 2.0, 5.0], normalize=True)), dense(pair))


@few
@given(seeds, st.permutations(range(3)))
def test_order_does_not_matter(seed, order):
    pairs, weight = adapters(seed), [0.3, -1.0, 2.0]
    turned = cat([pairs[i] for i in order], [weight[i] for i in order])
    close(dense(turned), dense(cat(pairs, weight)))
    close(dense(truncate(turned, 2)[0]), dense(truncate(cat(pairs, weight), 2)[0]), 64)


def test_errors_of_sums():
    pairs = adapters(2)
    with pytest.raises(RecipeError, match="there are none"):
        stack([], [])
    with pytest.raises(RecipeError, match="weight: 2 values for 3 models"):
        cat(pairs, [1.0, 2.0])
    with pytest.raises(RecipeError, match="add up to about 0"):
        cat(pairs, [1.0, 1.0, -2.0], normalize=True)
    with pytest.raises(RecipeError, match=r"adapter 1: the update is \[7, 9\], that of adapter 0 is \[13, 9\]"):
        cat([pairs[0], *adapters(0, out=7, ranks=(2,))], 1.0)


@pytest.mark.parametrize(("b", "a"), [((4, 2), (3, 5)), ((4,), (1, 5)), ((4, 0), (0, 5)), ((4, 2), (2, 5, 1))])
def test_what_is_no_product_is_refused(b, a):
    with pytest.raises(RecipeError, match="they are no product"):
        check_shapes([Factors(np.zeros(b, np.float32), np.zeros(a, np.float32))])


# --- decomposition


@pytest.mark.parametrize(
    ("out", "columns", "rank"), [(13, 9, 4), (5, 9, 8), (9, 5, 8), (3, 4, 20), (1, 1, 1), (6, 6, 1)]
)
def test_a_decomposition_is_one(out, columns, rank):
    (pair,) = adapters(3, out, columns, (rank,))
    u, s, v = decompose(pair)
    assert len(s) == min(out, columns, rank)
    np.testing.assert_allclose((u * s) @ v, dense(pair), atol=1e-13 * s[0])
    np.testing.assert_allclose(u.T @ u, np.eye(len(s)), atol=1e-13)
    np.testing.assert_allclose(v @ v.T, np.eye(len(s)), atol=1e-13)
    np.testing.assert_allclose(s, np.linalg.svd(dense(pair), compute_uv=False)[: len(s)], atol=1e-13 * s[0])
    assert (np.take_along_axis(u, np.abs(u).argmax(axis=0)[None], axis=0) > 0).all()


@few
@given(seeds, st.integers(1, 7), st.sampled_from([(13, 9), (5, 9), (9, 5), (8, 8)]))
def test_truncation_is_the_best_approximation(seed, rank, shape):
    (pair,) = adapters(seed, *shape, (8,))
    cut, error = truncate(pair, rank)
    wanted, lost = best(dense(pair), rank)
    assert cut.b.shape == (shape[0], rank)
    assert cut.a.shape == (rank, shape[1])
    np.testing.assert_allclose(dense(cut), wanted, atol=2.0**-20 * np.abs(wanted).max())
    assert error == pytest.approx(lost, abs=1e-13)
    np.testing.assert_allclose(np.linalg.norm(cut.b, axis=0), np.linalg.norm(cut.a, axis=1), rtol=1e-5, atol=1e-6)


def test_a_rank_that_is_there_changes_nothing():
    (pair,) = adapters(4, ranks=(3,))
    for rank in (3, 4, 100):
        cut, error = truncate(pair, rank)
        assert cut is pair
        assert error == 0.0
    with pytest.raises(RecipeError, match="rank: 0 is not at least 1"):
        truncate(pair, 0)


def test_a_rank_between_what_a_matrix_can_have_and_what_is_stored():
    (pair,) = adapters(5, 4, 6, (9,))
    cut, error = truncate(pair, 7)
    assert cut.rank == 7
    assert not cut.b[:, 4:].any()
    close(dense(cut), dense(pair), 64)
    assert error == 0.0


def test_zero_updates():
    (pair,) = adapters(6, ranks=(4,))
    cut, error = truncate(Factors(np.zeros_like(pair.b), pair.a), 2)
    assert not dense(cut).any()
    assert error == 0.0
    cut, error = of_dense(np.zeros((20, 30), np.float32), 2)
    assert not dense(cut).any()
    assert error == 0.0


def test_padding_adds_zeros():
    (pair,) = adapters(7, ranks=(3,))
    assert pad(pair, 2) is pair
    wide = pad(pair, 5)
    assert (wide.b.shape, wide.a.shape) == ((13, 5), (5, 9))
    np.testing.assert_array_equal(wide.b @ wide.a, pair.b @ pair.a)


# --- dense matrices


@pytest.mark.parametrize("shape", [(13, 9), (9, 13), (600, 7)])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_small_matrices_are_decomposed_in_full(shape, rank):
    matrix = np.random.default_rng(8).normal(0, 1, shape).astype(np.float32)
    cut, error = of_dense(matrix, rank)
    wanted, lost = best(matrix.astype(np.float64), rank)
    assert cut.rank == rank
    np.testing.assert_allclose(dense(cut), wanted, atol=2.0**-20)
    assert error == pytest.approx(lost, abs=1e-13)
    with pytest.raises(RecipeError, match="rank"):
        of_dense(matrix, 0)


def spectra():
    rng = np.random.default_rng(9)
    noise = rng.normal(0, 1, (700, 620))
    u, _, v = np.linalg.svd(noise, full_matrices=False)
    falls = np.arange(1, 621.0)
    sparse = rng.normal(0, 1, (700, 24)) @ rng.normal(0, 1, (24, 620))
    return {
        "noise": (noise, 2e-3),
        "slow": ((u / falls**0.5) @ v, 1e-5),
        "fast": ((u / falls**2) @ v, 1e-9),
        "trimmed": (np.where(np.abs(sparse) > np.quantile(np.abs(sparse), 0.8), sparse, 0), 1e-3),
    }


SPECTRA = spectra()


@pytest.mark.parametrize("name", SPECTRA)
def test_the_iteration_comes_near_the_best(name):
    matrix, bound = SPECTRA[name]
    matrix = matrix.astype(np.float32)
    for rank in (1, 8, 24):
        cut, error = of_dense(matrix, rank)
        wanted, lost = best(matrix.astype(np.float64), rank)
        assert lost * (1 - 1e-12) <= error <= lost * (1 + bound)
        real = np.linalg.norm(dense(cut) - matrix) / np.linalg.norm(matrix)
        assert real == pytest.approx(error, rel=1e-5)
        if name == "fast":
            np.testing.assert_allclose(dense(cut), wanted, atol=2.0**-20 * np.abs(wanted).max())


def test_the_iteration_loses_nothing_of_a_low_rank():
    (pair,) = adapters(10, 900, 600, (12,))
    matrix = (pair.b @ pair.a).astype(np.float32)
    for rank in (12, 16):
        cut, error = of_dense(matrix, rank)
        assert error < 1e-6
        close(dense(cut), matrix, 64)


def test_the_iteration_draws_the_same_every_time():
    matrix = SPECTRA["slow"][0].astype(np.float32)
    first, second = of_dense(matrix, 3)[0], of_dense(matrix.copy(order="F"), 3)[0]
    again = of_dense(matrix, 3)[0]
    np.testing.assert_array_equal(first.b, again.b)
    np.testing.assert_array_equal(first.a, again.a)
    np.testing.assert_allclose(dense(first), dense(second), atol=1e-6)


def test_a_zero_matrix_of_any_size():
    cut, error = of_dense(np.zeros((600, 700), np.float32), 2)
    assert not dense(cut).any()
    assert error == 0.0
