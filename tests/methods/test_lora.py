"""Low-rank updates as pairs of factors, against dense matrices; and the spaces that they are merged in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from low_rank import adapters, dense
from polymerge.errors import RecipeError
from polymerge.methods.lora import Factors, check_shapes, decompose, enter, of_dense, pad, stack, truncate
from polymerge.methods.sums import cat, svd
from polymerge.methods.ties import ties

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
    reordered = cat([pairs[i] for i in order], [weight[i] for i in order])
    close(dense(reordered), dense(cat(pairs, weight)))
    close(dense(truncate(reordered, 2)[0]), dense(truncate(cat(pairs, weight), 2)[0]), 64)


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


# --- spaces: nothing is lost on the way in and out, and they are those of the papers

LOSSLESS = ["knots", "core"]

shapes = st.sampled_from(
    [(13, 9, (3, 1, 4)), (5, 40, (3, 4)), (40, 5, (3, 4)), (4, 4, (8, 2)), (9, 9, (1,)), (1, 6, (1, 2))]
)


def summed(space, pairs, weight):
    """Every stack of coordinates merged by the weighted sum, and out again."""
    inside = enter(space, pairs)
    merged = [np.tensordot(np.array(weight, np.float64), x, 1).astype(np.float32) for x in inside.coordinates]
    return inside.leave(merged)


def near(got, wanted, size, rtol=4e-6):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=rtol * size)


@pytest.mark.parametrize("space", LOSSLESS)
@few
@given(seeds, shapes)
def test_a_weighted_sum_is_that_of_the_updates(space, seed, shape):
    pairs = adapters(seed, *shape)
    weight = [0.7, -1.3, 2.0][: len(pairs)]
    size = max(np.abs(dense(pair)).max() for pair in pairs)
    near(dense(summed(space, pairs, weight)), sum(w * dense(p) for w, p in zip(weight, pairs, strict=True)), size)


@pytest.mark.parametrize("space", LOSSLESS)
@few
@given(seeds)
def test_every_adapter_comes_out_as_it_went_in(space, seed):
    pairs = adapters(seed)
    inside = enter(space, pairs)
    (stack,) = inside.coordinates
    assert stack.dtype == np.float32
    assert len(stack) == 3
    for coordinates, pair in zip(stack, pairs, strict=True):
        for given_as in (coordinates, coordinates.ravel()):
            near(dense(inside.leave([given_as])), dense(pair), np.abs(dense(pair)).max() + 5)


@pytest.mark.parametrize("space", [*LOSSLESS, "factors"])
@few
@given(seeds, st.permutations(range(3)))
def test_order_does_not_matter_in_a_space(space, seed, order):
    pairs = adapters(seed, ranks=(2, 2, 2))
    weight = [1.0, 0.4, -0.6]
    reordered = summed(space, [pairs[i] for i in order], [weight[i] for i in order])
    near(dense(reordered), dense(summed(space, pairs, weight)), 10)


@pytest.mark.parametrize("space", LOSSLESS)
def test_order_does_not_matter_to_a_method_that_is_not_linear(space):
    pairs = adapters(0, 30, 20, (3, 3, 3))

    def merged(order):
        inside = enter(space, [pairs[i] for i in order])
        (stack,) = inside.coordinates
        rows = stack.reshape(3, -1).copy()
        return dense(inside.leave([ties(rows, [1.0] * 3, 0.4)]))

    near(merged([2, 0, 1]), merged([0, 1, 2]), 10)


def test_knots_is_the_paper_s():
    """The SVD of the updates side by side; the coordinates are the blocks of right vectors, up to signs."""
    pairs = adapters(1, 13, 9, (3, 1, 4))
    inside = enter("knots", pairs)
    u, s, v = np.linalg.svd(np.concatenate([dense(pair) for pair in pairs], axis=1), full_matrices=False)
    (stack,) = inside.coordinates
    assert stack.shape == (3, 8, 9)
    signs = np.sign((inside.left * u[:, :8]).sum(axis=0))
    np.testing.assert_allclose(inside.left, u[:, :8] * s[:8] * signs, atol=1e-12)
    for place, coordinates in enumerate(stack):
        np.testing.assert_allclose(coordinates, signs[:, None] * v[:8, 9 * place : 9 * place + 9], atol=1e-6)


def test_core_is_the_paper_s():
    """Left vectors of the stacked B, right ones of the stacked A, and what of each update lies between them."""
    pairs = adapters(2, 13, 9, (3, 1, 2))
    inside = enter("core", pairs)
    u = np.linalg.svd(np.concatenate([pair.b for pair in pairs], axis=1).astype(float), full_matrices=False)[0]
    v = np.linalg.svd(np.concatenate([pair.a for pair in pairs]).astype(float), full_matrices=False)[2]
    np.testing.assert_allclose(np.abs(inside.left), np.abs(u), atol=1e-12)
    np.testing.assert_allclose(np.abs(inside.right), np.abs(v), atol=1e-12)
    (stack,) = inside.coordinates
    assert stack.shape == (3, 6, 6)
    for coordinates, pair in zip(stack, pairs, strict=True):
        np.testing.assert_allclose(coordinates, inside.left.T @ dense(pair) @ inside.right.T, atol=1e-5)


@pytest.mark.parametrize("space", LOSSLESS)
def test_directions_that_are_no_directions_are_left_out(space):
    (pair,) = adapters(3, ranks=(4,))
    (stack,) = enter(space, [pair, pair, pair]).coordinates
    assert stack.shape == ((3, 4, 9) if space == "knots" else (3, 4, 4))
    near(dense(summed(space, [pair, pair, pair], [0.2, 0.3, 0.5])), dense(pair), 10)


@pytest.mark.parametrize("space", LOSSLESS)
def test_untrained_adapters(space):
    one, other = adapters(4, ranks=(3, 2))
    blank = Factors(np.zeros_like(other.b), other.a)
    near(dense(summed(space, [one, blank], [1.0, 1.0])), dense(one), 10)
    (stack,) = enter(space, [blank, blank]).coordinates
    assert stack.size
    assert not dense(summed(space, [blank, blank], [1.0, 1.0])).any()


def test_factors_are_merged_apart():
    pairs = adapters(5, ranks=(3, 3))
    inside = enter("factors", pairs)
    a, b = inside.coordinates
    assert (a.shape, b.shape) == ((2, 3, 9), (2, 13, 3))
    merged = summed("factors", pairs, [1.0, 1.0])
    np.testing.assert_allclose(merged.a, pairs[0].a + pairs[1].a, atol=1e-6)
    np.testing.assert_allclose(merged.b, pairs[0].b + pairs[1].b, atol=1e-6)
    alone = summed("factors", pairs[:1], [1.0])
    np.testing.assert_array_equal(alone.a, pairs[0].a)
    np.testing.assert_array_equal(alone.b, pairs[0].b)


def test_signs_are_certain():
    pairs = adapters(6)
    knots, core = enter("knots", pairs), enter("core", pairs)
    for columns in (knots.left, core.left, core.right.T):
        assert (np.take_along_axis(columns, np.abs(columns).argmax(axis=0)[None], axis=0) > 0).all()


def test_errors_of_spaces():
    pairs = adapters(7)
    with pytest.raises(RecipeError, match=r"ranks \[3, 1, 4\], so their factors do not match\. Set space: delta"):
        enter("factors", pairs)
    with pytest.raises(RecipeError, match="space: 'delta' is not one of factors, knots, core"):
        enter("delta", pairs)
    with pytest.raises(RecipeError, match="there are none"):
        enter("core", [])
    with pytest.raises(RecipeError, match="that of adapter 0"):
        enter("knots", [pairs[0], *adapters(0, out=7, ranks=(2,))])
    with pytest.raises(RecipeError, match="merged: "):
        enter("core", pairs).leave([np.zeros(3, np.float32)])
    with pytest.raises(RecipeError, match="merged: "):
        enter("factors", pairs[:1]).leave([np.zeros((3, 9), np.float32)])
