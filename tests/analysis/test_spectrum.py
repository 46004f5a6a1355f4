"""Singular directions and effective ranks of large matrices, against decompositions in full."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymerge.analysis import spectrum
from polymerge.analysis.spectrum import effective_rank, shared_share, spectrum_of, spectrum_of_factors
from polymerge.methods.lora import Factors

ROWS, COLUMNS = 640, 560


def falling(rng: np.random.Generator, power: float) -> np.ndarray:
    """Singular values 1, 2^-power, 3^-power, ..."""
    left, _ = np.linalg.qr(rng.normal(size=(ROWS, COLUMNS)))
    right, _ = np.linalg.qr(rng.normal(size=(COLUMNS, COLUMNS)))
    return (left * np.arange(1, COLUMNS + 1.0) ** -power) @ right


def thin(rng: np.random.Generator, rank: int) -> np.ndarray:
    return rng.normal(size=(ROWS, rank)) @ rng.normal(size=(rank, COLUMNS))


KINDS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "noise": lambda rng: rng.normal(size=(ROWS, COLUMNS)),
    "few entries": lambda rng: np.where(rng.random((ROWS, COLUMNS)) < 0.01, rng.normal(size=(ROWS, COLUMNS)), 0),
    "few rows": lambda rng: rng.normal(size=(ROWS, COLUMNS)) * (rng.random((ROWS, 1)) < 0.1),
    "rank 5": lambda rng: thin(rng, 5),
    "rank 60": lambda rng: thin(rng, 60),
    "rank 60 and noise": lambda rng: thin(rng, 60) + 0.5 * rng.normal(size=(ROWS, COLUMNS)),
    "falling slowly": lambda rng: falling(rng, 0.5),
    "falling": lambda rng: falling(rng, 1),
    "falling fast": lambda rng: falling(rng, 2),
    "very small numbers": lambda rng: 1e-30 * falling(rng, 0.5),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("turned", [False, True])
def test_an_estimated_rank_is_near_the_one_of_all_singular_values(kind: str, turned: bool) -> None:
    matrix = KINDS[kind](np.random.default_rng(1)).astype(np.float32)
    matrix = np.ascontiguousarray(matrix.T) if turned else matrix
    found = spectrum_of(matrix.copy(), 8)
    assert found is not None
    assert not found.exact
    wanted = effective_rank(np.linalg.svd(matrix.astype(float), compute_uv=False))
    assert found.effective == pytest.approx(wanted, rel=0.08)


@pytest.mark.parametrize("kind", ["rank 5", "falling", "falling fast"])
def test_the_largest_directions_are_those_of_a_full_decomposition(kind: str) -> None:
    matrix = KINDS[kind](np.random.default_rng(2)).astype(np.float32)
    left, _, right = np.linalg.svd(matrix.astype(float), full_matrices=False)
    found = spectrum_of(matrix, 3)
    assert found is not None
    assert found.left.shape == (ROWS, 3)
    assert shared_share(found.left, left[:, :3]) == pytest.approx(1, abs=1e-6)
    assert shared_share(found.right, right[:3].T) == pytest.approx(1, abs=1e-6)


@settings(max_examples=20)
@given(st.integers(0, 99), st.sampled_from([(40, 30), (30, 40), (1, 9), (9, 1), (25, 25)]), st.integers(1, 12))
def test_what_is_small_is_decomposed_in_full(seed: int, shape: tuple[int, int], rank: int) -> None:
    matrix = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    left, values, right = np.linalg.svd(matrix.astype(float), full_matrices=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectrum, "ROWS", 7)  # more than one block of rows
        found = spectrum_of(matrix, rank)
    assert found is not None
    assert found.exact
    assert found.effective == pytest.approx(effective_rank(values))
    count = min(rank, *shape)
    np.testing.assert_allclose(found.left @ found.left.T, left[:, :count] @ left[:, :count].T, atol=1e-9)
    np.testing.assert_allclose(found.right @ found.right.T, right[:count].T @ right[:count], atol=1e-9)


def test_effective_ranks_that_are_known() -> None:
    assert effective_rank(np.ones(7)) == pytest.approx(7)
    assert effective_rank(np.array([3.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(np.array([2.0, 1, 1])) == pytest.approx(np.exp(1.5 * np.log(2)))
    identity = spectrum_of(np.eye(600, dtype=np.float32), 4)
    assert identity is not None
    assert identity.effective == pytest.approx(600, rel=1e-3)


def test_zero_has_no_spectrum() -> None:
    assert spectrum_of(np.zeros((600, 700), np.float32), 3) is None
    assert spectrum_of(np.zeros((6, 7), np.float32), 3) is None
    assert spectrum_of_factors(Factors(np.zeros((6, 2), np.float32), np.ones((2, 7), np.float32)), 3) is None


def test_spaces_of_known_angles() -> None:
    axes = np.eye(4)
    turned = np.array([[np.cos(0.3)], [np.sin(0.3)], [0], [0]])
    assert shared_share(axes[:, :1], turned) == pytest.approx(np.cos(0.3) ** 2)
    assert shared_share(axes[:, :2], axes[:, 1:3]) == 0.5
    assert shared_share(axes[:, :2], axes[:, 2:]) == 0
    assert shared_share(axes[:, :1], axes[:, :3]) == 1  # as many of each as the smaller one has
