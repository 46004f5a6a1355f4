"""DC-Merge against dense SVDs in float64 and a loop over entries, and its properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymerge.errors import RecipeError
from polymerge.methods.dc_merge import dc_merge
from spectral import away, deltas_of, literal_dc_merge

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 999)
shapes = st.sampled_from([(13, 9), (9, 13), (10, 10)])


@few
@given(seeds, st.integers(1, 3), shapes, st.sampled_from([0.001, 0.1, 0.5]), st.sampled_from(["none", "avg", "linear"]))
def test_it_is_the_released_one(seed, models, shape, keep, smoothing):
    for dtype in (np.float32, np.float64):
        deltas = deltas_of(seed, models, *shape, dtype=dtype)
        merged = dc_merge(deltas.copy(), keep, smoothing, 3.0)
        assert (merged.dtype, merged.shape) == (dtype, shape)
        assert away(merged, literal_dc_merge(deltas, keep, smoothing, 3.0)) < 2e-5


@few
@given(seeds, shapes)
def test_of_as_many_components_as_are_said(seed, shape):
    deltas = deltas_of(seed, 3, *shape)
    assert away(dc_merge(deltas.copy(), 0.1, "none", ranks=[2] * 3), literal_dc_merge(deltas, 0.1, kept=2)) < 2e-5


@few
@given(seeds, st.permutations(range(3)))
def test_order_does_not_matter(seed, order):
    deltas = deltas_of(seed)
    assert away(dc_merge(deltas[order], 0.1), dc_merge(deltas, 0.1)) < 1e-5


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_one_model_all_of_whose_entries_stay_is_itself(shape):
    deltas = deltas_of(1, 1, *shape)
    assert away(dc_merge(deltas.copy(), 1.0), deltas[0]) < 1e-5


def test_of_equal_models_a_part_is_dropped():
    (delta,) = deltas_of(2, 1, 12, 9, rank=3)
    assert away(dc_merge(np.stack([delta] * 3), 1.0), delta / 3) < 1e-5


def test_one_model_whose_singular_values_are_made_equal_keeps_them_all():
    deltas = deltas_of(6, 1)
    u, s, v = np.linalg.svd(deltas[0].astype(np.float64), full_matrices=False)
    assert away(dc_merge(deltas.copy(), smoothing="avg"), s.mean() * u @ v) < 1e-5


def test_deltas_of_zero_and_of_low_rank():
    assert not dc_merge(np.zeros((3, 5, 7), np.float32)).any()
    deltas = deltas_of(3, 2, 12, 9, rank=2)
    for smoothing in ("none", "avg", "linear"):
        assert np.isfinite(dc_merge(deltas.copy(), 0.1, smoothing)).all()
    deltas[1] = 0
    assert away(dc_merge(deltas.copy(), 1.0), deltas[0]) < 1e-5
    assert not dc_merge(deltas_of(4, 5, 4, 3)).any()  # more models than components


def test_errors():
    with pytest.raises(RecipeError, match="keep, rho"):
        dc_merge(deltas_of(5), 1.5)
    with pytest.raises(RecipeError, match="keep, rho"):
        dc_merge(deltas_of(5), rho=0.5)
    with pytest.raises(RecipeError, match="smoothing: 'x' is not one of none, avg, linear"):
        dc_merge(deltas_of(5), smoothing="x")
