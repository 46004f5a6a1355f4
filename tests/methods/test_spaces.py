"""The spaces that adapters are merged in: nothing is lost on the way in and out, and they are those of the papers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from low_rank import adapters, dense
from polymerge.errors import RecipeError
from polymerge.methods.factors import Factors
from polymerge.methods.spaces import enter
from polymerge.methods.ties import ties

few = settings(max_examples=20)
seeds = st.integers(0, 999)
LOSSLESS = ["knots", "core"]

shapes = st.sampled_from(
    [(13, 9, (3, 1, 4)), (5, 40, (3, 4)), (40, 5, (3, 4)), (4, 4, (8, 2)), (9, 9, (1,)), (1, 6, (1, 2))]
)


def summed(space, pairs, weight):
    """Every stack of coordinates merged by the weighted sum, and out again."""
    inside = enter(space, pairs)
    merged = [np.tensordot(np.array(weight, np.float64), x, 1).astype(np.float32) for x in inside.coordinates]
    return inside.leave(merged)


def close(got, wanted, size, rtol=4e-6):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=rtol * size)


@pytest.mark.parametrize("space", LOSSLESS)
@few
@given(seeds, shapes)
def test_a_weighted_sum_is_that_of_the_updates(space, seed, shape):
    pairs = adapters(seed, *shape)
    weight = [0.7, -1.3, 2.0][: len(pairs)]
    size = max(np.abs(dense(pair)).max() for pair in pairs)
    close(dense(summed(space, pairs, weight)), sum(w * dense(p) for w, p in zip(weight, pairs, strict=True)), size)


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
            close(dense(inside.leave([given_as])), dense(pair), np.abs(dense(pair)).max() + 5)


@pytest.mark.parametrize("space", [*LOSSLESS, "factors"])
@few
@given(seeds, st.permutations(range(3)))
def test_order_does_not_matter(space, seed, order):
    pairs = adapters(seed, ranks=(2, 2, 2))
    weight = [1.0, 0.4, -0.6]
    turned = summed(space, [pairs[i] for i in order], [weight[i] for i in order])
    close(dense(turned), dense(summed(space, pairs, weight)), 10)


@pytest.mark.parametrize("space", LOSSLESS)
def test_order_does_not_matter_to_a_method_that_is_not_linear(space):
    pairs = adapters(0, 30, 20, (3, 3, 3))

    def merged(order):
        inside = enter(space, [pairs[i] for i in order])
        (stack,) = inside.coordinates
        rows = stack.reshape(3, -1).copy()
        return dense(inside.leave([ties(rows, [1.0] * 3, 0.4)]))

    close(merged([2, 0, 1]), merged([0, 1, 2]), 10)


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
    close(dense(summed(space, [pair, pair, pair], [0.2, 0.3, 0.5])), dense(pair), 10)


@pytest.mark.parametrize("space", LOSSLESS)
def test_untrained_adapters(space):
    one, other = adapters(4, ranks=(3, 2))
    blank = Factors(np.zeros_like(other.b), other.a)
    close(dense(summed(space, [one, blank], [1.0, 1.0])), dense(one), 10)
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


def test_errors():
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
