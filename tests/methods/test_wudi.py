"""OptMerge against its 300 steps, SWUDI and ASWUDI against their formulas as written, in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymerge.errors import RecipeError
from polymerge.methods.wudi import aswudi, optmerge, swudi
from spectral import away, deltas_of, flow, literal_closed, literal_optmerge, participation

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 999)
shapes = st.sampled_from([(13, 9), (9, 13), (10, 10), (3, 14), (14, 2)])
dtypes = st.sampled_from([np.float32, np.float64])
ALL = pytest.mark.parametrize("method", [optmerge, swudi, aswudi])


@few
@given(seeds, st.integers(1, 4), shapes, dtypes)
def test_optmerge_is_300_steps(seed, models, shape, dtype):
    deltas = deltas_of(seed, models, *shape, dtype=dtype)
    merged = optmerge(deltas.copy())
    assert (merged.dtype, merged.shape) == (dtype, shape)
    assert away(merged, literal_optmerge(deltas, min(shape) // models)) < 1e-5


@few
@given(seeds, shapes)
def test_optmerge_of_as_many_components_as_are_said(seed, shape):
    deltas = deltas_of(seed, 3, *shape)
    assert away(optmerge(deltas.copy(), ranks=[2] * 3), literal_optmerge(deltas, 2)) < 1e-5


@few
@given(
    seeds,
    st.integers(1, 3),
    shapes,
    dtypes,
    st.sampled_from(["sum", "mean", "zero"]),
    st.sampled_from([0.3, 0.65, 1.0]),
)
def test_swudi_is_its_formula(seed, models, shape, dtype, init, share):
    deltas = deltas_of(seed, models, *shape, dtype=dtype)
    merged = swudi(deltas.copy(), init, share)
    assert (merged.dtype, merged.shape) == (dtype, shape)
    assert away(merged, literal_closed(deltas, init, lambda found: flow(found, share))) < 1e-5


@few
@given(seeds, st.integers(1, 3), shapes, dtypes, st.sampled_from(["sum", "mean", "zero"]))
def test_aswudi_is_its_formula(seed, models, shape, dtype, init):
    deltas = deltas_of(seed, models, *shape, dtype=dtype)
    assert away(aswudi(deltas.copy(), init), literal_closed(deltas, init, participation)) < 1e-5


@ALL
@few
@given(seed=seeds, shape=shapes, order=st.permutations(range(4)))
def test_order_does_not_matter(method, seed, shape, order):
    deltas = deltas_of(seed, 4, *shape)
    assert away(method(deltas[order]), method(deltas)) < 1e-5


@ALL
@pytest.mark.parametrize("shape", [(13, 9), (9, 13), (3, 14)])
def test_one_model_is_itself(method, shape):
    deltas = deltas_of(1, 1, *shape)
    assert away(method(deltas.copy()), deltas[0]) < 1e-5


@ALL
def test_equal_models_are_one_at_the_minimum(method):
    (delta,) = deltas_of(2, 1, 9, 12)
    start = {} if method is optmerge else {"init": "mean"}
    assert away(method(np.stack([delta] * 3), **start), delta) < 1e-5


@ALL
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (2, 9)])
def test_zero_deltas_stay_zero_and_count_for_nothing(method, shape):
    assert not method(np.zeros((3, *shape), np.float32)).any()
    deltas = deltas_of(3, 2, *shape)
    deltas[1] = 0
    assert np.isfinite(method(deltas)).all()


@ALL
@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_deltas_of_low_rank(method, shape):
    for dtype in (np.float32, np.float64):
        deltas = deltas_of(4, 2, *shape, rank=2, dtype=dtype)
        merged = method(deltas.copy())
        assert np.isfinite(merged).all()
        assert np.linalg.matrix_rank(merged, tol=1e-3) <= 4
    assert away(optmerge(deltas.copy()), literal_optmerge(deltas, 4)) < 1e-5


def test_along_what_both_models_have_swudi_takes_each_in_proportion_to_its_share():
    one, other = np.zeros((2, 4, 3))
    one[0, 0], other[1, 1] = 2.0, 5.0  # inputs apart: nobody interferes
    merged = swudi(np.stack([one, other]), share=1.0)
    assert away(merged, one + other) < 1e-6


def test_median_of_an_even_number_is_the_lower_one():
    deltas = deltas_of(6, 3, 12, 10)
    found = np.linalg.eigvalsh(sum(d.T.astype(float) @ d / np.square(d, dtype=float).sum() for d in deltas))
    merged = aswudi(deltas.copy(), "zero", "gavish_donoho")
    b = 10 / 12
    known = 2 * (b + 1) + 8 * b / (b + 1 + np.sqrt(b * b + 14 * b + 1))
    above = np.sqrt(found) > np.sqrt(known / ((1 - b) ** 2 + b)) * np.sqrt(found[4])
    assert np.linalg.matrix_rank(merged, tol=1e-5) == max(1, above.sum())


def test_errors():
    with pytest.raises(RecipeError, match="init: 'median' is not one of sum, mean, zero"):
        swudi(deltas_of(5), "median")
    with pytest.raises(RecipeError, match=r"share: 2 is not in \[0, 1\]"):
        swudi(deltas_of(5), share=2)
    with pytest.raises(RecipeError, match="rank_rule: 'x' is not one of participation_sqrt, gavish_donoho"):
        aswudi(deltas_of(5), rank_rule="x")
