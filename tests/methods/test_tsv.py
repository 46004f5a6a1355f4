"""TSV-Merge against a dense computation from the paper."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from low_rank import adapters, dense
from polymerge.errors import RecipeError
from polymerge.methods.lora import Factors, truncate
from polymerge.methods.tsv import tsv, tsv_of_deltas
from spectral import away, deltas_of, literal_tsv

few = settings(max_examples=20)
seeds = st.integers(0, 999)


def literal(pairs, weight, count):
    """The update [out, in], with full matrices."""
    return literal_tsv([dense(pair) for pair in pairs], weight, count)


def close(got, wanted, rtol=2e-6):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=rtol * np.abs(wanted).max())


@few
@given(seeds, st.integers(3, 13), st.lists(st.sampled_from([-1.0, 0.5, 1.0, 2.0]), min_size=3, max_size=3))
def test_it_is_the_paper_s(seed, rank, weight):
    pairs = adapters(seed, 17, 14, (4, 4, 5))
    merged = tsv(pairs, weight, rank=rank)
    assert merged.rank == 3 * (rank // 3)
    close(dense(merged), literal(pairs, weight, rank // 3))


@few
@given(seeds, st.permutations(range(3)))
def test_order_does_not_matter(seed, order):
    pairs, weight = adapters(seed, 17, 14, (2, 3, 4)), [0.5, 1.0, -2.0]
    close(dense(tsv([pairs[i] for i in order], [weight[i] for i in order], rank=7)), dense(tsv(pairs, weight, rank=7)))


@few
@given(seeds, st.integers(1, 6))
def test_one_adapter_is_itself_cut_to_the_rank(seed, rank):
    (pair,) = adapters(seed, ranks=(4,))
    close(dense(tsv([pair], 1.0, rank=rank)), dense(truncate(pair, rank)[0]))


def test_directions_of_the_adapters_are_orthogonal_afterwards():
    merged = tsv(adapters(0, 30, 20, (3, 3)), [1.0, 1.0], rank=6)
    for columns in (merged.b, merged.a.T):
        columns = columns / np.linalg.norm(columns, axis=0)
        np.testing.assert_allclose(columns.T @ columns, np.eye(6), atol=1e-6)


def test_equal_adapters_are_one_adapter():
    (pair,) = adapters(1, ranks=(4,))
    close(dense(tsv([pair] * 3, [1.0, 1.0, 1.0], rank=12)), dense(pair), 1e-5)
    close(dense(tsv([pair] * 2, [0.5, 1.5], rank=4)), dense(truncate(pair, 2)[0]), 1e-5)


def test_adapters_without_a_say_push_nobody_aside():
    one, other = adapters(2, ranks=(3, 3))
    blank = Factors(np.zeros_like(other.b), other.a)
    for pairs, weight in (([one, blank], [1.0, 1.0]), ([one, other], [1.0, 0.0])):
        close(dense(tsv(pairs, weight, rank=6)), dense(one))
    merged = tsv([blank, blank], [1.0, 1.0], rank=4)
    assert (merged.b.shape, merged.a.shape) == ((13, 1), (1, 9))
    assert not dense(merged).any()


def test_every_adapter_keeps_one_direction_at_least():
    pairs = adapters(3, ranks=(2, 2, 2))
    merged = tsv(pairs, 1.0, rank=1)
    assert merged.rank == 3
    close(dense(merged), literal(pairs, [1.0] * 3, 1))


def test_more_directions_than_dimensions():
    pairs = adapters(4, 5, 4, (3, 3, 3))
    merged = tsv(pairs, 1.0, rank=9)
    assert np.isfinite(dense(merged)).all()
    close(dense(merged), literal(pairs, [1.0] * 3, 3))


def test_errors():
    pairs = adapters(5)
    with pytest.raises(RecipeError, match="rank: 0 is not at least 1"):
        tsv(pairs, 1.0, rank=0)
    with pytest.raises(RecipeError, match="weight: 2 values for 3 models"):
        tsv(pairs, [1.0, 1.0], rank=4)
    with pytest.raises(RecipeError, match="there are none"):
        tsv([], [], rank=4)
    with pytest.raises(RecipeError, match="that of adapter 0"):
        tsv([pairs[0], *adapters(0, out=7, ranks=(2,))], 1.0, rank=4)


@few
@given(
    seeds,
    st.sampled_from([(13, 9), (9, 13), (8, 8)]),
    st.lists(st.sampled_from([-1.0, 0.5, 2.0]), min_size=3, max_size=3),
)
def test_on_deltas_it_is_the_paper_s(seed, shape, weight):
    deltas = deltas_of(seed, 3, *shape)
    wanted = literal_tsv(deltas, weight, min(shape) // 3)
    for dtype in (np.float32, np.float64):
        assert away(tsv_of_deltas(deltas.astype(dtype), weight), wanted) < 1e-5
    wanted = literal_tsv(deltas, weight, 2)
    assert away(tsv_of_deltas(deltas.copy(), weight, share=2.5 / min(shape)), wanted) < 1e-5


@few
@given(seeds, st.permutations(range(3)))
def test_on_deltas_order_does_not_matter(seed, order):
    deltas, weight = deltas_of(seed), [0.5, 1.0, -2.0]
    assert away(tsv_of_deltas(deltas[order], [weight[i] for i in order]), tsv_of_deltas(deltas.copy(), weight)) < 1e-6


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_on_deltas_one_model_is_itself(shape):
    deltas = deltas_of(1, 1, *shape)
    assert away(tsv_of_deltas(deltas.copy()), deltas[0]) < 1e-6


def test_on_deltas_equal_models_are_one_and_blank_ones_push_nobody_aside():
    (delta,) = deltas_of(2, 1, 12, 9, rank=3)
    blank = np.zeros_like(delta)
    assert away(tsv_of_deltas(np.stack([delta] * 3)), delta) < 1e-5
    assert away(tsv_of_deltas(np.stack([delta] * 3), [1.0, 0.5, 0.0]), 0.75 * delta) < 1e-5
    assert away(tsv_of_deltas(np.stack([delta, blank]), share=0.5), delta) < 1e-5
    assert not tsv_of_deltas(np.stack([blank, blank])).any()


def test_more_models_than_components_keep_none_unless_a_share_is_said():
    deltas = deltas_of(3, 5, 4, 3)
    assert not tsv_of_deltas(deltas.copy()).any()
    assert np.isfinite(tsv_of_deltas(deltas.copy(), share=1.0)).all()
