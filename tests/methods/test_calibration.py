"""SVC against a loop over directions and models, in float64, and its properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymerge.errors import RecipeError
from polymerge.methods.calibration import svc
from spectral import away, deltas_of, literal_svc

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 999)
shapes = st.sampled_from([(13, 9), (9, 13), (10, 10)])


@few
@given(seeds, st.integers(1, 4), shapes, st.sampled_from([0.1, 1.0]))
def test_it_is_the_paper_s(seed, models, shape, alpha):
    for dtype in (np.float32, np.float64):
        deltas = deltas_of(seed, models, *shape, dtype=dtype)
        merged = (0.7 * deltas.sum(axis=0)).astype(dtype)
        got = svc(merged.copy(), deltas.copy(), alpha)
        assert (got.dtype, got.shape) == (dtype, shape)
        assert away(got, literal_svc(merged, deltas, alpha)) < 1e-5


def test_deltas_are_left_as_they_are():
    deltas = deltas_of(0)
    svc(deltas.sum(axis=0), deltas)
    assert (deltas == deltas_of(0)).all()


def test_the_sum_of_equal_models_becomes_one_of_them():
    (delta,) = deltas_of(1, 1)
    assert away(svc(3 * delta, np.stack([delta] * 3)), delta) < 1e-5


def test_one_model_is_itself():
    deltas = deltas_of(2, 1)
    assert away(svc(deltas[0].copy(), deltas), deltas[0]) < 1e-6


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_models_without_anything_along_a_direction_do_not_touch_it(shape):
    deltas = np.zeros((2, *shape), np.float32)
    deltas[0, 0, 0], deltas[1, 3, 4] = 2, 5
    assert away(svc(deltas.sum(axis=0), deltas), deltas.sum(axis=0)) < 1e-6
    assert not svc(np.zeros(shape, np.float32), deltas).any()
    low = deltas_of(3, 2, *shape, rank=2)
    assert np.isfinite(svc(low.sum(axis=0), low)).all()
    low[1] = 0
    assert away(svc(low[0].copy(), low), low[0]) < 1e-5


def test_alpha_is_above_zero():
    with pytest.raises(RecipeError, match="alpha: 0 is not above 0"):
        svc(deltas_of(4)[0], deltas_of(4), 0)
