"""The decompositions that whole-matrix methods share, against numpy's SVD and polar factors from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polymerge.methods.decompositions import (
    add_up,
    components,
    gram_of_columns,
    inverse_root,
    multiply,
    orthogonal,
    tall,
)
from polymerge.methods.method import method_function
from polymerge.methods.table import METHODS
from running import loaded_by

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 999)
sizes = st.integers(1, 9)


def spread(seed, m, n, values):
    """A matrix [m, n] of these singular values, and its singular vectors."""
    draws = np.random.default_rng(seed)
    u, v = (np.linalg.qr(draws.standard_normal((size, len(values))))[0] for size in (m, n))
    return (u * values) @ v.T, u, v


@few
@given(seeds, sizes, sizes, st.sampled_from([np.float32, np.float64]))
def test_components_are_those_of_numpy(seed, m, n, dtype):
    matrix = tall(np.random.default_rng(seed).standard_normal((m, n)).astype(dtype))
    found = components(matrix)
    s = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(found.s, s, rtol=1e-5)
    np.testing.assert_allclose(found.v.T @ found.v, np.eye(len(s)), atol=1e-12)
    rebuilt = (matrix @ found.to_left * found.s) @ found.v.T
    np.testing.assert_allclose(rebuilt, matrix, rtol=0, atol=1e-6)
    assert len(components(matrix, 1).s) == 1


@pytest.mark.parametrize("smallest", [1e-1, 1e-3, 1e-5])
def test_a_gram_matrix_costs_less_accuracy_than_rounding_to_float32(smallest):
    values = np.geomspace(1, smallest, 12)
    exact, _, v = spread(3, 40, 12, values)
    rounded = exact.astype(np.float32)
    s, right = np.linalg.svd(rounded.astype(np.float64), full_matrices=False)[1:]
    found = components(rounded)
    by_gram = np.abs((found.v * right.T).sum(axis=0))  # cosines of each vector to that of an SVD of the same matrix
    by_rounding = np.abs((right.T * v).sum(axis=0))
    bound = np.finfo(np.float64).eps * (values[0] / values) ** 2  # times the smaller side, 12
    assert (np.abs(found.s - s) <= 12 * bound * s).all()
    assert (np.sqrt(1 - np.minimum(by_gram, 1) ** 2) <= 12 * bound + 1e-7).all()
    assert by_gram.min() >= by_rounding.min() - 1e-12


def test_what_is_rounding_counts_as_zero():
    exact, _, _ = spread(4, 30, 8, np.array([3.0, 1.0, 0.5]))
    assert len(components(exact).s) == 3
    assert len(components(np.asfortranarray(exact)).s) == 3
    low = (np.arange(30.0)[:, None] * np.ones((1, 8))).astype(np.float32)
    assert len(components(low).s) == 1
    for dtype in (np.float32, np.float64):
        none = components(np.zeros((5, 3), dtype))
        assert (none.s.shape, none.v.shape, none.to_left.shape) == ((0,), (3, 0), (3, 0))


@few
@given(seeds, st.integers(1, 6), st.integers(0, 6))
def test_the_polar_factor_is_that_of_an_svd(seed, n, copies):
    columns = np.random.default_rng(seed).standard_normal((12, n))
    columns = np.concatenate([columns, columns[:, :copies]], axis=1)
    inverse = inverse_root(columns.T @ columns)
    p, _, q = np.linalg.svd(columns, full_matrices=False)
    rank = min(12, n)
    np.testing.assert_allclose(columns @ inverse, p[:, :rank] @ q[:rank], atol=1e-6)
    parts = [columns[:, :1], columns[:, 1:]]
    np.testing.assert_allclose(orthogonal(parts), columns @ inverse, atol=1e-12)
    assert not parts


def test_products_do_not_depend_on_layout_and_may_be_in_place():
    draws = np.random.default_rng(5)
    one, other = (draws.standard_normal((3000, 800)).astype(np.float32) for _ in range(2))  # three blocks of rows
    right = draws.standard_normal((1600, 800))
    whole = np.concatenate([one, other], axis=1, dtype=np.float64)
    wanted = whole @ right
    lying = tall(np.ascontiguousarray(other.T))
    np.testing.assert_array_equal(gram_of_columns([one, other]), gram_of_columns([one, lying]))
    np.testing.assert_allclose(gram_of_columns([one, other]), whole.T @ whole, atol=1e-9)
    multiply([one, lying], right, one)
    np.testing.assert_allclose(one, wanted, atol=1e-4, rtol=1e-6)
    assert lying.base is not None


def test_sums_are_rounded_once():
    big, small = np.full((2, 1), 2.0**24, np.float32), np.ones((2, 1), np.float32)
    add_up([big, small, small], small, [1.0, 1.0, 1.0])
    assert small.tolist() == [[2.0**24 + 2]] * 2
    add_up([small, big], big, [1.0, -1.0])
    assert big.tolist() == [[2.0]] * 2


# --- on a device


@pytest.mark.parametrize("row", [row for row in METHODS.values() if row.takes_tensors], ids=lambda row: row.name)
@pytest.mark.parametrize("shape", [(3, 17, 8), (3, 8, 17), (2, 9, 9), (3, 40, 600), (2, 600, 530)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_torch_tensors_are_merged_alike(row, shape, dtype):
    deltas = np.random.default_rng(7).standard_normal(shape).astype(dtype)
    deltas[0, 0] = 0
    function = method_function(row)
    weight = {"weight": [1.0, 0.5, -1.0][: shape[0]]} if row.parameter("weight") else {}
    wanted = function(deltas.copy(), **weight)
    tensors = torch.from_numpy(deltas.copy())
    merged = function(tensors, **weight)
    assert isinstance(merged, torch.Tensor)
    assert merged.dtype == tensors.dtype
    assert merged.data_ptr() == tensors.data_ptr()  # in their memory: nothing large was made beside
    assert np.linalg.norm(merged.numpy() - wanted) < 1e-6 * np.linalg.norm(wanted)
    assert not function(torch.zeros(shape), **weight).any()


def test_numpy_alone_needs_no_torch():
    code = "import numpy; from polymerge.methods.isotropic import iso_c; iso_c(numpy.ones((2, 3, 4)))"
    assert "torch" not in loaded_by(code)
