"""Iso-C against a dense SVD in float64, and the properties of isotropic merging."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymerge.methods.isotropic import iso_c
from spectral import away, deltas_of

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 999)
sizes = st.integers(1, 11)


def literal_iso_c(deltas):
    """The paper's lines: one SVD of the sum, each singular value its mean."""
    u, s, v = np.linalg.svd(deltas.astype(np.float64).sum(axis=0), full_matrices=False)
    return s.mean() * u @ v


@few
@given(seeds, st.integers(1, 4), sizes, sizes, st.sampled_from([np.float32, np.float64]))
def test_iso_c_is_the_paper_s(seed, models, m, n, dtype):
    deltas = deltas_of(seed, models, m, n, dtype=dtype)
    merged = iso_c(deltas.copy())
    assert (merged.dtype, merged.shape) == (dtype, (m, n))
    assert away(merged, literal_iso_c(deltas)) < 1e-5


@few
@given(seeds, st.permutations(range(4)))
def test_order_does_not_matter(seed, order):
    deltas = deltas_of(seed, 4)
    assert away(iso_c(deltas[order]), iso_c(deltas)) < 1e-6


def test_lying_matrices_are_standing_ones():
    deltas = deltas_of(0, 3, 6, 17)
    upright = np.ascontiguousarray(deltas.swapaxes(1, 2))
    assert away(iso_c(upright).T, iso_c(deltas)) < 1e-6


def test_directions_have_one_strength():
    s = np.linalg.svd(iso_c(deltas_of(1)), compute_uv=False)
    np.testing.assert_allclose(s, s.mean(), rtol=1e-5)


@pytest.mark.parametrize("method", [iso_c])
def test_zero_deltas_stay_zero(method):
    assert not method(np.zeros((3, 5, 7), np.float32)).any()


def test_directions_that_the_sum_lacks_stay_zero():
    deltas = deltas_of(2, 2, 12, 9, rank=2)
    merged = iso_c(deltas.copy())
    u, s, v = np.linalg.svd(deltas.astype(np.float64).sum(axis=0))
    assert away(merged, s.sum() / 9 * u[:, :4] @ v[:4]) < 1e-5
    assert np.linalg.matrix_rank(merged, tol=1e-4) == 4
