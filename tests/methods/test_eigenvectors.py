"""Eigenvectors of symmetric matrices in place, by each way there is, against numpy's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymerge.methods import decompositions
from polymerge.methods.decompositions import eigenvectors

few = settings(max_examples=30, deadline=None)
WAYS = ["scipy", "numpy"]


@pytest.fixture(params=WAYS)
def _way(request, monkeypatch):
    """Take each way to find eigenvectors."""
    if request.param == "numpy":
        monkeypatch.setattr(decompositions, "_scipy", lambda: None)
    elif decompositions._scipy() is None:
        pytest.skip("SciPy is not installed")


EACH = pytest.mark.usefixtures("_way")


def symmetric_of(values, seed=0):
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))[0]
    matrix = (q * values) @ q.T
    return (matrix + matrix.T) / 2


def check(matrix, wanted):
    told = []

    def count(values):
        told.append(values.copy())
        return wanted

    values, vectors = eigenvectors(matrix.copy(), count)
    every = np.linalg.eigvalsh(matrix)[::-1]
    size = max(1.0, np.abs(every).max(initial=0.0))
    assert (values.shape, vectors.shape) == ((wanted,), (len(matrix), wanted))
    np.testing.assert_allclose(told[0], every, rtol=0, atol=1e-12 * size)
    np.testing.assert_allclose(values, every[:wanted], rtol=0, atol=1e-12 * size)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(wanted), rtol=0, atol=1e-9)
    np.testing.assert_allclose(matrix @ vectors, vectors * values, rtol=0, atol=1e-9 * size)


@EACH
@pytest.mark.parametrize("size", [1, 2, 3, 40, 130])
def test_the_largest_come_first(size):
    matrix = symmetric_of(np.random.default_rng(size).standard_normal(size))
    for wanted in {0, 1, size // 3, size - 1, size}:
        check(matrix, wanted)


@EACH
@pytest.mark.parametrize("equal", [1.0, 0.0])
def test_many_are_equal(equal):
    values = np.full(120, equal)
    values[:10] = np.linspace(1.5, 2, 10)
    for wanted in (5, 50, 120):
        check(symmetric_of(values), wanted)
    check(equal * np.eye(30), 30)


@few
@given(st.integers(0, 999), st.integers(1, 30), st.integers(1, 30))
def test_of_low_rank(seed, size, rank):
    columns = np.random.default_rng(seed).standard_normal((size, rank))
    check(columns @ columns.T, min(size, rank))


@EACH
def test_the_matrix_gives_its_memory_and_is_read_in_either_order():
    matrix = symmetric_of(np.arange(9.0))
    wanted = eigenvectors(matrix.copy(), len)[1]
    np.testing.assert_array_equal(eigenvectors(np.asfortranarray(matrix), len)[1], wanted)


@EACH
def test_as_many_as_are_said_at_most() -> None:
    matrix, told = symmetric_of(np.arange(12.0)), []

    def wanted(values):
        told.append(values.copy())
        return 2

    values, vectors = eigenvectors(matrix.copy(), wanted, 5)
    np.testing.assert_allclose(told[0], [11, 10, 9, 8, 7], atol=1e-12)
    np.testing.assert_allclose(values, [11, 10], atol=1e-12)
    np.testing.assert_allclose(matrix @ vectors, vectors * values, atol=1e-12)


def test_squares_that_are_too_large_are_told():
    with np.errstate(all="ignore"), pytest.raises(np.linalg.LinAlgError):
        eigenvectors(np.full((4, 4), np.inf), len)


def test_none_of_nothing():
    values, vectors = eigenvectors(np.zeros((0, 0)), len)
    assert (values.shape, vectors.shape) == ((0,), (0, 0))
