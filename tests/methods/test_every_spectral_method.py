"""What holds of every method on whole matrices, and of their calibration, whatever the formula."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from polymerge.methods.calibration import svc
from polymerge.methods.decompositions import one_thread
from polymerge.methods.method import method_function
from polymerge.methods.table import METHODS
from spectral import away, deltas_of


def functions():
    found = {row.name: method_function(row) for row in METHODS.values() if row.on == "matrices"}
    return found | {"calibrate: svc": lambda deltas: svc(deltas.sum(axis=0), deltas.copy())}


FUNCTIONS = functions()
EACH = pytest.mark.parametrize("name", FUNCTIONS)


@EACH
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (10, 10), (3, 14), (14, 3), (1, 6), (6, 1)])
def test_deltas_of_low_rank_stay_where_they_are(name, shape, dtype):
    deltas = deltas_of(3, 3, *shape, rank=2, dtype=dtype)
    merged = FUNCTIONS[name](deltas.copy())
    assert (merged.shape, merged.dtype) == (shape, dtype)
    assert np.isfinite(merged).all()
    left = np.linalg.svd(np.concatenate(list(deltas), axis=1).astype(float))[0][:, :6]
    right = np.linalg.svd(np.concatenate(list(deltas), axis=0).astype(float))[2][:6].T
    size = max(np.linalg.norm(merged), np.linalg.norm(deltas))
    assert np.linalg.norm(merged - left @ left.T @ merged) < 1e-5 * size
    assert np.linalg.norm(merged - merged @ right @ right.T) < 1e-5 * size


@EACH
@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (2, 9), (9, 2)])
def test_more_models_than_directions(name, shape):
    deltas = deltas_of(4, 6, *shape)
    merged = FUNCTIONS[name](deltas.copy())
    assert merged.shape == shape
    assert np.isfinite(merged).all()


@EACH
def test_the_size_of_the_deltas_is_that_of_what_is_merged(name):
    deltas = deltas_of(5, 3, 12, 9)
    merged = FUNCTIONS[name](deltas.copy())
    for factor in (2.0**-20, 2.0**20):
        assert away(FUNCTIONS[name](factor * deltas), factor * merged) < 1e-5


@EACH
@pytest.mark.parametrize("shape", [(60, 24), (24, 60), (40, 40)])
def test_the_same_bits_on_any_thread(name, shape):
    deltas = deltas_of(6, 3, *shape)
    made = [np.zeros(0)] * 4

    def merge(place):
        made[place] = FUNCTIONS[name](deltas.copy()).copy()

    with one_thread():
        threads = [threading.Thread(target=merge, args=(place,)) for place in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for one in made[1:]:
        np.testing.assert_array_equal(one, made[0])
