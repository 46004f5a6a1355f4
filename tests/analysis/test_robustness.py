"""How far a merge keeps an adapter's directions, against dense decompositions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from low_rank import adapters, dense
from polymerge.analysis.robustness import Agreement, directions
from polymerge.errors import RecipeError
from polymerge.methods.lora import Factors, pad, stack, truncate

few = settings(max_examples=20)


def literal(merged, task, places):
    """Mean |cos| over left and right vectors, and mean ratio, of the components at some places."""
    u, s, v = np.linalg.svd(merged)
    x, t, y = np.linalg.svd(task)
    cosines = [(abs(u[:, i] @ x[:, i]) + abs(v[i] @ y[i])) / 2 for i in places]
    return np.mean(cosines), np.mean([s[i] / t[i] for i in places])


@few
@given(st.integers(0, 999), st.integers(1, 3))
def test_it_is_the_dense_computation(seed, largest):
    pairs = adapters(seed, 13, 9, (4, 4))
    merged = stack(pairs, [1.0, 0.3])
    found = directions(merged, pairs[0], largest)
    for group, places in ((found.largest, range(largest)), (found.rest, range(largest, 4))):
        cosine, ratio = literal(dense(merged), dense(pairs[0]), places)
        assert group.count == len(places)
        assert group.cosine == pytest.approx(cosine, rel=1e-9)
        assert group.ratio == pytest.approx(ratio, rel=1e-9)
    assert found.left_out == 0


def test_an_adapter_beside_itself():
    (pair,) = adapters(0, ranks=(4,))
    for merged, ratio in ((pair, 1.0), (Factors(-2 * pair.b, pair.a), 2.0)):
        found = directions(merged, pair, 1)
        for group in (found.largest, found.rest):
            assert group.cosine == pytest.approx(1.0)
            assert group.cosine <= 1
            assert group.ratio == pytest.approx(ratio)
        assert (found.largest.count, found.rest.count, found.left_out) == (1, 3, 0)


def test_directions_that_share_nothing():
    b, a = np.eye(6, dtype=np.float32), np.eye(5, dtype=np.float32)
    task = Factors(b[:, :2] * np.float32([2, 1]), a[:2])
    merged = Factors(b[:, 2:4] * np.float32([6, 1]), a[2:4])
    assert directions(merged, task, 1).largest == Agreement(0.0, 3.0, 1)
    assert directions(merged, task, 1).rest == Agreement(0.0, 1.0, 1)


def test_what_has_no_direction_is_left_out_and_counted():
    (pair,) = adapters(1, ranks=(4,))
    cut, _ = truncate(pair, 2)
    for merged in (cut, pad(cut, 7)):  # the merge lacks two
        found = directions(merged, pair, 1)
        assert (found.largest.count, found.rest.count, found.left_out) == (1, 1, 2)
    found = directions(pair, pad(cut, 4), 3)  # the adapter lacks two, and then there is no rest
    assert found.rest is None
    assert (found.largest.count, found.left_out) == (2, 2)
    blank = Factors(np.zeros_like(pair.b), pair.a)
    for merged, task in ((blank, pair), (pair, blank), (blank, blank)):
        found = directions(merged, task, 1)
        assert found.largest is None
        assert found.rest is None
        assert found.left_out == 4


def test_errors():
    (pair,), (other,) = adapters(2, ranks=(3,)), adapters(2, out=7, ranks=(3,))
    with pytest.raises(RecipeError, match="largest: 0 is not at least 1"):
        directions(pair, pair, 0)
    with pytest.raises(RecipeError, match="that of adapter 0"):
        directions(pair, other, 1)
