"""Methods on all deltas of an entry together, and breadcrumbs: against literal loops, in numpy and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from literal_methods import most_important
from polymerge.engine.statistics import STATISTICS
from polymerge.errors import RecipeError
from polymerge.methods.breadcrumbs import breadcrumbs, breadcrumbs_ties
from polymerge.methods.consensus import arcee_fusion, nearswap, ram, ramplus_tl, sce
from polymerge.methods.method import Method, method_function
from polymerge.methods.table import METHODS

Floats = NDArray[np.float32]
EVERY = ("breadcrumbs", "breadcrumbs_ties", "sce", "nearswap", "ram", "ramplus_tl")
GIVEN: dict[str, dict[str, Any]] = {
    "breadcrumbs": {"weight": [0.5, 0.3, 0.4], "density": [0.5, 0.9, 0.2], "gamma": [0.1, 0.2, 0.0]},
    "breadcrumbs_ties": {"weight": [0.5, 0.3, 0.4], "density": [0.5, 0.9, 0.2], "gamma": [0.1, 0.2, 0.0]},
    "sce": {"select_topk": 0.3},
    "nearswap": {"t": 0.05},
    "ram": {"epsilon": 0.1},
    "ramplus_tl": {"epsilon": 0.1, "r": 0.5, "alpha": 0.7},
}


def deltas(models: int = 3, n: int = 120, seed: int = 1) -> Floats:
    """Random deltas [model, n], a third of whose entries are 0."""
    draws = np.random.default_rng(seed)
    return (draws.normal(size=(models, n)) * (draws.random((models, n)) > 1 / 3)).astype(np.float32) / 5


class InBlocks:
    """A tensor as a source of blocks, as the engine has it."""

    def __init__(self, rows: Floats, size: int) -> None:
        self._blocks = [rows[:, start : start + size] for start in range(0, rows.shape[1], size)]
        self.sizes = [block.shape[1] for block in self._blocks]

    def read(self, index: int) -> Floats:
        return self._blocks[index].copy()


def in_blocks(row: Method, rows: Floats, given: dict[str, Any], size: int) -> Floats:
    """What a method makes of a tensor that it sees in blocks only."""
    source, more = InBlocks(rows, size), dict[str, Any]()
    if row.statistic is not None:
        more[row.statistic] = STATISTICS[row.statistic].compute(source, given, lambda look, places: map(look, places))
    function = method_function(row)
    return np.concatenate([function(source.read(index), **given, **more) for index in range(len(source.sizes))])


def models_of(row: Method) -> int:
    return row.models or 3


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("size", [7, 120])
def test_blocks_change_no_bit(name: str, size: int) -> None:
    row = METHODS[name]
    rows = deltas(models_of(row))
    defaults = {one.name: one.default for one in row.parameters if one.name != "scale"}
    given = {**defaults, **GIVEN[name]}
    assert np.array_equal(in_blocks(row, rows, given, size), method_function(row)(rows.copy(), **given))


@pytest.mark.parametrize("name", EVERY)
def test_torch_gives_the_same_bits(name: str) -> None:
    row = METHODS[name]
    rows = deltas(models_of(row))
    found = method_function(row)(torch.from_numpy(rows.copy()), **GIVEN[name])
    assert np.array_equal(found.numpy(), method_function(row)(rows.copy(), **GIVEN[name]))


@pytest.mark.parametrize("name", EVERY)
def test_deltas_of_zero_stay_zero(name: str) -> None:
    row = METHODS[name]
    assert not method_function(row)(np.zeros((models_of(row), 9), np.float32), **GIVEN[name]).any()


def test_breadcrumbs_drops_both_ends() -> None:
    row = np.array([[5, -4, 3, -2, 1, 0.5, 0.25, -0.125, 0.1, 0]], np.float32)
    # one of ten above, and then four that stay
    assert breadcrumbs(row.copy(), [2], 0.4, 0.1).tolist() == [0, -8, 6, -4, 2, 0, 0, 0, 0, 0]
    assert breadcrumbs(row.copy(), [1], 1.0, 0.1).tolist() == row[0].tolist()
    assert not breadcrumbs(row.copy(), [1], 0.0, 0.1).any()
    # 0.95 of ten is nine: of the two outliers only one goes
    assert np.count_nonzero(breadcrumbs(row.copy(), [1], 0.95, 0.2)) == 8
    # no outlier among ten at a hundredth: nothing is dropped above
    assert breadcrumbs(row.copy(), [1], 0.2, 0.01).tolist() == [5, -4, *[0] * 8]


def test_breadcrumbs_keeps_equals_of_either_end() -> None:
    row = np.array([[4, 3, 3, 2, 2, 1]], np.float32)
    assert breadcrumbs(row.copy(), [1], 0.5, 0.2).tolist() == [0, 3, 3, 2, 2, 0]


def test_breadcrumbs_ties_elects_among_what_is_left() -> None:
    rows = np.array([[9, 1, 0.1], [8, -3, 0.1]], np.float32)
    assert breadcrumbs_ties(rows, [1, 1], 0.34, 0.34).tolist() == [0, -3, 0]


def literal_sce(rows: NDArray[np.float64], topk: float) -> NDArray[np.float64]:
    models, n = rows.shape
    variances = [np.var(rows[:, i]) for i in range(n)]
    count = int(topk * sum(one != 0 for one in variances))
    least = sorted(variances)[n - count] if count else np.inf
    kept = np.array([[rows[t, i] if variances[i] >= least else 0.0 for i in range(n)] for t in range(models)])
    squares = (kept**2).mean(axis=1)
    weights = squares / squares.sum()
    out = np.zeros(n)
    for i in range(n):
        plus = kept[:, i].sum() >= 0
        agree = [t for t in range(models) if (kept[t, i] > 0 if plus else kept[t, i] < 0)]
        if agree:
            out[i] = sum(weights[t] * kept[t, i] for t in agree) / sum(weights[t] for t in agree)
    return out


@pytest.mark.parametrize("topk", [0.1, 0.5, 0.9])
def test_sce_selects_calculates_and_erases(topk: float) -> None:
    rows = deltas(4)
    assert np.allclose(sce(rows.copy(), topk), literal_sce(rows.astype(np.float64), topk), rtol=1e-5, atol=1e-6)


def test_sce_of_equal_models_is_their_delta_and_selects_nothing_of_it() -> None:
    rows = np.repeat(deltas(1), 3, axis=0)
    assert np.allclose(sce(rows.copy()), rows[0], rtol=1e-6)
    with pytest.raises(RecipeError, match="select_topk: 2"):
        sce(rows, 2)


def test_nearswap_takes_what_is_near_and_steps_towards_what_is_far() -> None:
    rows = np.array([[0.01, -0.05, 0.5, -0.5, 0]], np.float32)
    assert np.allclose(nearswap(rows, 0.05), [0.01, -0.05, 0.05, -0.05, 0])
    with pytest.raises(RecipeError, match="one model beside base_model"):
        nearswap(deltas(2), 0.1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("width", [None, 12, 1])
def test_arcee_fusion_takes_what_is_far_above_the_quartiles(dtype: type, width: int | None) -> None:
    rows, base = deltas(1).astype(dtype), deltas(1, seed=2)[0].astype(dtype) * 9
    found = arcee_fusion(rows.copy(), base=base, width=width)
    assert np.array_equal(found, most_important(rows[0], base, width or 120))
    assert 0 < np.count_nonzero(found) < np.count_nonzero(rows) or width == 1  # a row of one has no other probability
    as_tensors = arcee_fusion(torch.from_numpy(rows.copy()), base=torch.from_numpy(base), width=width)
    assert np.array_equal(as_tensors.numpy(), found)


def test_arcee_fusion_takes_all_where_three_quarters_are_equal_to_the_base() -> None:
    rows, base = np.zeros((1, 40), np.float32), np.linspace(-1, 1, 40, dtype=np.float32)
    rows[0, ::5] = 0.25
    assert np.array_equal(arcee_fusion(rows.copy(), base=base), rows[0])
    with pytest.raises(RecipeError, match="one model beside base_model"):
        arcee_fusion(deltas(2), base=base)


def test_ram_averages_what_is_shared_and_takes_what_is_not() -> None:
    rows = np.array([[1, 1, 0, 0.05], [3, 0, 0, 0.05], [0, 0, -2, 0]], np.float32)
    assert ram(rows.copy(), 0.1).tolist() == [2, 1, -2, 0]
    # the first model shares one entry and has one alone, the last shares none
    assert np.allclose(ramplus_tl(rows.copy(), 0.5, 0.6, 0.1), [2, 1 + 0.5 * 0.6, -2, 0])
