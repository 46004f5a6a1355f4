"""Cutoffs found out of core against sorting."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from polymerge.engine import cutoffs as selection
from polymerge.engine.cutoffs import exact_cutoffs, joined, look_through
from polymerge.engine.merge import merge
from polymerge.methods.kernels import keep_largest
from polymerge.methods.table import METHODS
from running import checkpoint


class Blocks:
    """An array [model, n], read in blocks into one buffer per call, as a runner would."""

    def __init__(self, x, sizes, tensors=False):
        assert sum(sizes) == x.shape[1]
        self.x, self.sizes, self.tensors, self.reads = x, sizes, tensors, 0

    def read(self, index):
        self.reads += 1
        start = sum(self.sizes[:index])
        block = self.x[:, start : start + self.sizes[index]].copy()
        return torch.from_numpy(block) if self.tensors else block


def cut(n, block):
    return [min(block, n - start) for start in range(0, n, block)]


def by_sorting(x, keep):
    """What is left of each row: the largest, and all that is equal to the least of them."""
    out = np.zeros_like(x)
    for row, count, left in zip(x, keep, out, strict=True):
        if count > 0:
            chosen = np.abs(row) >= np.sort(np.abs(row))[::-1][min(count, row.size) - 1]
            left[chosen] = row[chosen]
    return out


def check(x, keep, sizes, run_all=map, **kind):
    cutoffs = exact_cutoffs(Blocks(x, sizes, **kind), keep, run_all)
    np.testing.assert_array_equal(keep_largest(x.copy(), cutoffs), by_sorting(x, keep))
    return cutoffs


KINDS = {
    "numbers": lambda rng, n: rng.normal(0, 1, n),
    "few magnitudes": lambda rng, n: np.round(rng.normal(0, 1, n) * 3) / 8,
    "mostly zeros": lambda rng, n: np.where(rng.random(n) < 0.8, np.copysign(0.0, rng.normal(0, 1, n)), 1.5),
    "denormals": lambda rng, n: rng.integers(-20, 20, n) * 1e-45,
    "one magnitude": lambda rng, n: np.copysign(0.75, rng.normal(0, 1, n)),
    "rising": lambda rng, n: np.sort(rng.normal(0, 1, n)),
    "huge": lambda rng, n: rng.uniform(-3.4028e38, 3.4028e38, n),
    "many scales": lambda rng, n: 10.0 ** rng.integers(-30, 30, n) * rng.normal(0, 1, n),
}


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 999),
    st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=3),
    st.integers(1, 700),
    st.integers(1, 800),
    st.lists(st.floats(0, 1.1), min_size=3, max_size=3),
    st.sampled_from([np.float32, np.float64]),
    st.sampled_from([(1 << 23, 1 << 16), (0, 1 << 16), (20, 8), (1 << 23, 2)]),
)
def test_it_is_what_sorting_gives(seed, kinds, n, block, shares, dtype, limits):
    rng = np.random.default_rng(seed)
    x = np.array([KINDS[kind](rng, n) for kind in kinds]).astype(dtype)
    keep = [int(share * n) for share in shares[: len(kinds)]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "GATHERED", limits[0])
        patch.setattr(selection, "SAMPLED", limits[1])
        apart = check(x, keep, cut(n, min(block, n)))
        models = [0, *range(len(kinds)), len(kinds) - 1]
        several = [n // 2, *keep, 1]
        together = exact_cutoffs(Blocks(x, cut(n, min(block, n))), several, map, models)
        assert together[1:-1] == apart
        for place in (0, -1):
            alone = np.array([x[models[place]]])
            assert exact_cutoffs(Blocks(alone, cut(n, min(block, n))), [several[place]], map) == [together[place]]


@pytest.mark.parametrize("kind", KINDS)
def test_neither_blocks_nor_threads_matter(kind):
    rng = np.random.default_rng(7)
    x = np.array([KINDS[kind](rng, 60000) for _ in range(2)], np.float32)
    keep = [12000, 30001]
    with ThreadPoolExecutor(4) as pool:
        found = {
            tuple(check(x, keep, sizes, run_all, **options))
            for sizes, run_all, options in (
                (cut(60000, 60000), map, {}),
                (cut(60000, 4096), map, {}),
                (cut(60000, 1009), pool.map, {}),
                ([1, 29999, 17, 20000, 9983], pool.map, {}),
                (cut(60000, 8192), map, {"tensors": True}),
            )
        }
    assert len(found) == 1


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 999),
    st.sampled_from(sorted(KINDS)),
    st.lists(st.integers(1, 400), min_size=2, max_size=5),
    st.floats(0, 1),
    st.sampled_from([(1 << 23, 1 << 16), (0, 1 << 16), (20, 8)]),
)
def test_parts_that_are_looked_through_apart_find_the_same(seed, kind, parts, share, limits):
    rng = np.random.default_rng(seed)
    n = sum(parts)
    x = np.array([KINDS[kind](rng, n) for _ in range(2)]).astype(np.float32)
    ends = np.cumsum([0, *parts])
    apart = [Blocks(x[:, one:two], cut(two - one, 90)) for one, two in itertools.pairwise(ends)]

    def look(windows):
        found = [look_through(part, windows, map) for part in apart]
        return [joined(of) for of in zip(*found, strict=True)]

    whole, keep = cut(n, 70), [int(share * n), n // 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "GATHERED", limits[0])
        patch.setattr(selection, "SAMPLED", limits[1])
        elsewhere = exact_cutoffs(Blocks(x, whole), keep, map, look=look)
    assert elsewhere == exact_cutoffs(Blocks(x, whole), keep, map)


def test_one_pass_is_enough_for_an_ordinary_tensor():
    x = np.random.default_rng(3).normal(0, 2e-4, (2, 400000)).astype(np.float32)
    for rows in (x, (x + np.float32(0.02)).astype(np.float16).astype(np.float32) - np.float32(0.02)):
        source = Blocks(rows, cut(400000, 4000))
        exact_cutoffs(source, [80000, 80000], map)
        assert source.reads <= 100 + 6  # the pass and the sample
        source = Blocks(rows, cut(400000, 4000))
        exact_cutoffs(source, [80000, 80000, 4000, 4000], map, [0, 1, 0, 1])
        assert source.reads <= 100 + 6  # for all of them


def test_nothing_is_read_for_nothing():
    source = Blocks(np.ones((2, 100), np.float32), [50, 50])
    assert exact_cutoffs(source, [0, 100], map) == [np.inf, 0.0]
    assert source.reads == 0
    assert exact_cutoffs(Blocks(np.ones((2, 0), np.float32), []), [0, 1], map) == [np.inf, 0.0]


def test_nan_is_refused():
    x = np.full((1, 100), np.nan, np.float32)
    with pytest.raises(ValueError, match="NaN"):
        exact_cutoffs(Blocks(x, [50, 50]), [50], map)


@pytest.mark.parametrize("method", [row.name for row in METHODS.values() if row.entrywise and row.models in (None, 2)])
def test_models_without_a_number_are_merged(method: str, tmp_path: Path) -> None:
    """Tensors that have no elements have no norms, cutoffs or angles either."""
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.zeros(0, 4)}
    base, one, two = (checkpoint(tmp_path / name, tensors) for name in ("base", "one", "two"))
    recipe = {"merge_method": method, "models": [str(one), str(two)]}
    row = METHODS[method]
    if row.on == "deltas":
        recipe["base_model"] = str(base)
    recipe["parameters"] = {one.name: 0.5 for one in row.parameters if one.default is None and not one.optional}
    out = merge(recipe, tmp_path / "out", check=False).folder
    assert {name: tuple(held.shape) for name, held in load_file(out / "model.safetensors").items()} == {
        "model.layers.0.mlp.up_proj.weight": (0, 4)
    }
