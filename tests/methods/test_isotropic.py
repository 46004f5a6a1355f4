"""Iso-C and Iso-CTS against dense SVDs in float64, and the properties of isotropic merging."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymerge.errors import RecipeError
from polymerge.methods.isotropic import iso_c, iso_cts
from spectral import away, deltas_of, literal_iso_c, literal_iso_cts

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 999)
sizes = st.integers(1, 11)
dtypes = st.sampled_from([np.float32, np.float64])


@few
@given(seeds, st.integers(1, 4), sizes, sizes, dtypes)
def test_iso_c_is_the_paper_s(seed, models, m, n, dtype):
    deltas = deltas_of(seed, models, m, n, dtype=dtype)
    merged = iso_c(deltas.copy())
    assert (merged.dtype, merged.shape) == (dtype, (m, n))
    assert away(merged, literal_iso_c(deltas)) < 1e-5


@few
@given(
    seeds, st.integers(1, 3), st.sampled_from([(13, 9), (9, 13), (10, 10)]), st.sampled_from([0.4, 0.8, 1.0]), dtypes
)
def test_iso_cts_is_the_released_one(seed, models, shape, fraction, dtype):
    deltas = deltas_of(seed, models, *shape, dtype=dtype)
    merged = iso_cts(deltas.copy(), fraction)
    assert (merged.dtype, merged.shape) == (dtype, shape)
    assert away(merged, literal_iso_cts(deltas, fraction)) < 1e-5


@pytest.mark.parametrize("method", [iso_c, iso_cts])
@few
@given(seed=seeds, order=st.permutations(range(4)))
def test_order_does_not_matter(method, seed, order):
    deltas = deltas_of(seed, 4)
    assert away(method(deltas[order]), method(deltas)) < 1e-5


def test_lying_matrices_are_standing_ones():
    deltas = deltas_of(0, 3, 6, 17)
    upright = np.ascontiguousarray(deltas.swapaxes(1, 2))
    assert away(iso_c(upright).T, iso_c(deltas)) < 1e-6


@pytest.mark.parametrize("method", [iso_c, iso_cts])
def test_directions_have_one_strength(method):
    s = np.linalg.svd(method(deltas_of(1)), compute_uv=False)
    np.testing.assert_allclose(s, s.mean(), rtol=1e-5)


@pytest.mark.parametrize("method", [iso_c, iso_cts])
def test_zero_deltas_stay_zero(method):
    assert not method(np.zeros((3, 5, 7), np.float32)).any()
    assert not method(np.zeros((2, 7, 5))).any()


@pytest.mark.parametrize("method", [iso_c, iso_cts])
def test_directions_that_no_delta_has_stay_zero(method):
    for dtype in (np.float32, np.float64):
        deltas = deltas_of(2, 2, 12, 9, rank=2, dtype=dtype)
        merged = method(deltas.copy())
        u, s, v = np.linalg.svd(deltas.astype(np.float64).sum(axis=0))
        assert away(merged, s[:4].sum() / 9 * u[:, :4] @ v[:4]) < 1e-5
        assert np.linalg.matrix_rank(merged, tol=1e-4) == 4


def test_equal_models_have_nothing_of_their_own():
    delta = deltas_of(3, 1)
    together = iso_cts(np.concatenate([delta] * 3))
    assert np.isfinite(together).all()
    u, s, v = np.linalg.svd(delta[0].astype(np.float64), full_matrices=False)
    # 9 directions: 6 are common, and each model's own one is the same
    assert away(together, (3 * s[:6].sum() + 3 * s[6]) / 9 * (u[:, :7] @ v[:7])) < 1e-5


def test_many_models_and_few_directions():
    deltas = deltas_of(4, 6, 12, 10)
    for fraction in (0.0, 0.4, 0.8):
        assert np.isfinite(iso_cts(deltas.copy(), fraction)).all()
    assert away(iso_cts(deltas.copy(), 0.9), iso_c(deltas)) < 1e-6


def test_a_share_out_of_range_is_refused():
    with pytest.raises(RecipeError, match=r"common_space_fraction: 1.5 is not in \[0, 1\]"):
        iso_cts(deltas_of(5), 1.5)
