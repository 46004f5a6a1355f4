"""The largest components of a matrix, against its literal SVD."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from polymerge.errors import RecipeError
from polymerge.methods import leading as module
from polymerge.methods.leading import energy_of, leading, residual, residuals, room_for
from polymerge.methods.lora import Factors


def matrix(out: int, width: int, seed: int = 0, decay: float = 0.8) -> np.ndarray:
    """A matrix whose singular values fall by `decay`, float32."""
    rng = np.random.default_rng(seed)
    size = min(out, width)
    left, right = (np.linalg.qr(rng.normal(size=(side, size)))[0] for side in (out, width))
    return (left * decay ** np.arange(size) @ right.T).astype(np.float32)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (9, 9), (1, 5)])
@pytest.mark.parametrize("rank", [1, 3, 100])
def test_a_rank_leaves_out_what_the_svd_says(shape: tuple[int, int], rank: int) -> None:
    x = matrix(*shape)
    factors = leading(x, rank)
    u, s, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    kept = min(rank, *shape)
    assert factors.rank == kept
    np.testing.assert_allclose(factors.b @ factors.a, u[:, :kept] * s[:kept] @ v[:kept], rtol=0, atol=1e-6)
    assert residual(x, factors) == pytest.approx(np.square(s[kept:]).sum(), abs=1e-12)
    # both sides share the singular values evenly
    np.testing.assert_allclose(np.linalg.norm(factors.b, axis=0), np.linalg.norm(factors.a, axis=1), rtol=1e-5)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_energy_gives_the_smallest_rank_that_holds_it(energy: float) -> None:
    x = matrix(40, 25)
    s = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    shares = np.cumsum(s**2) / np.sum(s**2)
    wanted = next(rank for rank, share in enumerate(shares, 1) if share >= energy)
    factors = leading(x, 256, energy)
    assert factors.rank == wanted
    assert residual(x, factors) <= (1 - energy) * energy_of(x) < residual(x, leading(x, wanted - 1))
    assert leading(x, wanted - 1, energy).rank == wanted - 1  # the highest that is allowed


def test_all_energy_of_a_low_rank_matrix_is_its_rank() -> None:
    rng = np.random.default_rng(3)
    whole = rng.integers(-3, 4, size=(20, 2)) @ rng.integers(-3, 4, size=(2, 31))  # exact in float32
    factors = leading(whole.astype(np.float32), 256, 1.0)
    assert factors.rank == 2
    np.testing.assert_allclose(factors.b @ factors.a, whole, atol=1e-5)


def test_many_components_of_a_large_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the Gram matrix, as exactly as by an SVD."""
    monkeypatch.setattr(module, "EXACT", 1)
    monkeypatch.setattr(module, "sketched", None)
    for x in (matrix(60, 40), matrix(40, 60), matrix(30, 30, decay=0.99)):
        u, s, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
        factors = leading(x, 7)
        np.testing.assert_allclose(factors.b @ factors.a, u[:, :7] * s[:7] @ v[:7], rtol=0, atol=1e-6)
        shares = np.cumsum(s**2) / np.sum(s**2)
        assert leading(x, 25, float(shares[4]) - 1e-9).rank == 5
        assert leading(x, 3, 0.9999).rank == 3
    low = matrix(40, 60)
    low[:] = low[:, :2] @ np.ones((2, 60), np.float32)
    assert leading(low, 20, 1.0).rank == 1
    assert leading(low, 20).rank == 20
    assert leading(np.zeros((40, 60), np.float32), 20, 0.5).rank == 0


def test_a_large_matrix_is_approximated_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT", 1)
    monkeypatch.setattr(module, "components", None)
    for x in (matrix(250, 190), matrix(190, 250, decay=0.99)):
        s = np.linalg.svd(x.astype(np.float64), compute_uv=False)
        factors = leading(x, 4)
        optimal = np.square(s[4:]).sum()
        assert optimal * (1 - 1e-6) <= residual(x, factors) <= optimal * 1.002
        shares = np.cumsum(s**2) / np.sum(s**2)
        assert leading(x, 4, float(shares[2]) - 2e-3).rank == 3


def test_zeros_have_no_components() -> None:
    zeros = np.zeros((5, 3), np.float32)
    assert leading(zeros, 2, 0.9).rank == 0
    assert leading(zeros, 2).rank == 2  # a rank that was asked for is what comes out
    assert residual(zeros, leading(zeros, 2, 0.9)) == 0


def test_what_is_no_rank_and_no_share() -> None:
    with pytest.raises(RecipeError, match="rank: 0 is not at least 1"):
        leading(matrix(3, 3), 0)
    for energy in (0.0, 1.01):
        with pytest.raises(RecipeError, match="is no share"):
            leading(matrix(3, 3), 1, energy)


def test_what_the_first_components_leave_is_the_residual_of_each() -> None:
    x = matrix(700, 30)
    whole, exact = leading(x, 12), energy_of(x)
    rounded = Factors(whole.b.astype(np.float16).astype(np.float32), whole.a)
    for factors in (whole, rounded):
        left = [residual(x, Factors(factors.b[:, :rank], factors.a[:rank])) for rank in range(1, 13)]
        np.testing.assert_allclose(residuals(x, factors), left, rtol=1e-6, atol=1e-14 * exact)
    full = leading(x, 30)
    assert 0 <= residuals(x, full)[-1] < 1e-12 * exact


@pytest.mark.parametrize(("shape", "rank"), [((600, 400), 8), ((1300, 700), 200), ((1500, 2100), 4)])
def test_the_memory_that_is_told_is_enough(shape: tuple[int, int], rank: int) -> None:
    """One shape for each of the ways: SVD, Gram matrix, subspace iteration."""
    tracemalloc.start()
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    tracemalloc.reset_peak()
    residuals(x, leading(x, rank))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.3 * room_for(*shape, rank) < peak < room_for(*shape, rank)
