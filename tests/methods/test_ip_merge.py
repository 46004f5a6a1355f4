"""IP-Merging against dense SVDs in float64, and its properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymerge.errors import RecipeError
from polymerge.methods.ip_merge import ip_merge
from spectral import away, deltas_of, literal_ip_merge

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 999)
shapes = st.sampled_from([(13, 9), (9, 13), (10, 10)])


@few
@given(seeds, st.integers(1, 3), shapes, st.sampled_from([1, 3, 1024]), st.sampled_from([0.0, 0.4, 0.9]))
def test_it_is_the_released_one_but_for_signs(seed, models, shape, rank, threshold):
    weight = [1.0, 0.5, -2.0][:models]
    for dtype in (np.float32, np.float64):
        deltas = deltas_of(seed, models, *shape, dtype=dtype)
        merged = ip_merge(deltas.copy(), weight, rank, threshold)
        assert (merged.dtype, merged.shape) == (dtype, shape)
        assert away(merged, literal_ip_merge(deltas, weight, rank, threshold)) < 1e-5


def test_one_model_is_itself():
    deltas = deltas_of(1, 1)
    assert away(ip_merge(deltas.copy()), deltas[0]) < 1e-6


def test_the_order_of_the_llms_does_not_matter():
    deltas = deltas_of(2, 3)
    assert away(ip_merge(deltas[[0, 2, 1]]), ip_merge(deltas)) < 1e-6


def test_what_lies_elsewhere_is_not_added():
    deltas = np.zeros((2, 4, 4), np.float32)
    deltas[0, 0, 0], deltas[1, 1, 1] = 2, 3
    assert ip_merge(deltas.copy()).tolist() == deltas[0].tolist()
    deltas[1, 1, 0] = 3 * 0.5  # cosine 0.447
    assert ip_merge(deltas.copy())[1, 0] == pytest.approx(3 * 0.5 * 2 / np.hypot(3, 1.5))
    assert ip_merge(deltas.copy(), threshold=0.5).tolist() == deltas[0].tolist()


@pytest.mark.parametrize("shape", [(5, 7), (7, 5)])
def test_zero_deltas_and_low_rank(shape):
    assert not ip_merge(np.zeros((3, *shape), np.float32)).any()
    deltas = deltas_of(3, 2, *shape, rank=2)
    blank = np.zeros_like(deltas[0])
    assert away(ip_merge(np.stack([deltas[0], blank])), deltas[0]) < 1e-6
    assert not ip_merge(np.stack([blank, deltas[0]])).any()
    assert np.isfinite(ip_merge(deltas, threshold=0.0)).all()


def test_errors():
    with pytest.raises(RecipeError, match="weight: 1 values for 3 models"):
        ip_merge(deltas_of(5), [1.0])
