"""DELLA: draws by rank against a literal loop, what must hold of them, and the norm that is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import polymerge
from polymerge.engine.statistics import STATISTICS
from polymerge.errors import RecipeError, Refused
from polymerge.methods import kernels
from polymerge.methods.dare import dare_linear, dare_ties
from polymerge.methods.della import della, della_linear
from polymerge.methods.sums import task_arithmetic
from polymerge.methods.ties import ties
from running import cli, recipe_file, two_llamas

Floats = NDArray[Any]
KEYS = (11, 2**63 + 5)

relaxed = settings(deadline=None, max_examples=30)


def deltas(seed: int, n: int, models: int = 2, dtype: type = np.float32) -> Floats:
    """Deltas with many equals and zeros, as those of bfloat16 weights have them."""
    draws = np.random.default_rng(seed)
    x = draws.normal(size=(models, n))
    x[:, ::2] = np.round(x[:, ::2] * 2) / 4
    return x.astype(dtype)


def masks(n: int, width: int, density: float, epsilon: float, seeds: int, row: Floats) -> Floats:
    """How often each entry of a row is kept."""
    found = np.zeros(n)
    for seed in range(seeds):
        found += kernels.keep_ranked(row[None].copy(), width, [seed], 0, [density], [epsilon], [1.0])[0] != 0
    return found / seeds


def test_the_chance_rises_with_the_rank_and_equals_have_the_same() -> None:
    row = np.array([5, -4, 3, 2, 2, -2, 1, 0.5, 0.25, 0.125, 0.1, 0.05], np.float32)
    ranks = np.array([11, 10, 9, 7, 7, 7, 5, 4, 3, 2, 1, 0])
    chance = 0.5 + 0.3 * (2 * ranks / 11 - 1)
    assert np.abs(masks(12, 12, 0.5, 0.3, 4000, row) - chance).max() < 4 * 0.5 / np.sqrt(4000)
    # two rows of six: each has ranks of its own
    halves = np.concatenate([np.array([5, 4, 2, 2, 2, 0]), np.array([5, 4, 3, 2, 1, 0])])
    found = masks(12, 6, 0.5, 0.3, 4000, row)
    assert np.abs(found - (0.5 + 0.3 * (2 * np.array([5, 4, 3, 1, 1, 1, *halves[6:]]) / 5 - 1))).max() < 0.035


@relaxed
@given(st.integers(0, 999), st.integers(1, 40), st.integers(1, 30), st.sampled_from([np.float32, np.float64]))
def test_torch_gives_the_same_bits(seed: int, rows: int, width: int, dtype: type) -> None:
    x = deltas(seed, rows * width, dtype=dtype)
    given = {"width": width, "keys": KEYS, "start": seed * width, "density": [0.4, 0.7], "epsilon": [0.3, 0.1]}
    mine = kernels.keep_ranked(x.copy(), **given, factors=[1.7, 1.0])
    theirs = kernels.keep_ranked(torch.from_numpy(x.copy()), **given, factors=[1.7, 1.0])
    assert mine.tobytes() == theirs.numpy().tobytes()
    assert np.array_equal(kernels.magnitudes(x, width), kernels.magnitudes(torch.from_numpy(x), width))


@pytest.mark.parametrize("width", [61, 64, 1000, 2048, 5000])
@pytest.mark.parametrize("kind", ["few", "fine", "wild", "zeros", "both"])
def test_wide_rows_of_every_kind_are_ranked_as_by_sorting(width: int, kind: str) -> None:
    """By torch's kernel, which sorts: few different magnitudes, all different, over many octaves, most of them 0."""
    draws = np.random.default_rng(width)
    x = draws.normal(size=(2, 3 * width))
    few = np.round(x * 30) / 32
    x = {"few": few, "fine": x, "wild": x**21, "zeros": few * (draws.random(x.shape) < 0.1)}.get(
        kind, np.where(draws.random(x.shape) < 0.01, x, few)
    ).astype(np.float32)
    given = {"width": width, "keys": KEYS, "start": 3, "density": [0.4, 0.7], "epsilon": [0.3, 0.15]}
    mine = kernels.keep_ranked(x.copy(), **given, factors=[1.7, 1.0])
    theirs = kernels.keep_ranked(torch.from_numpy(x.copy()), **given, factors=[1.7, 1.0])
    assert mine.tobytes() == theirs.numpy().tobytes()


@relaxed
@given(st.integers(0, 999), st.integers(1, 9), st.floats(0, 1))
def test_without_an_epsilon_draws_are_those_of_dare(seed: int, rows: int, density: float) -> None:
    x, weight = deltas(seed, rows * 50), [0.9, 0.2]
    own = {"density": density, "epsilon": 0.0, "rescale": False, "width": 50, "keys": KEYS, "start": 50}
    theirs = {"density": density, "rescale": False, "keys": KEYS, "start": 50}
    assert della_linear(x.copy(), weight, **own).tobytes() == dare_linear(x.copy(), weight, **theirs).tobytes()
    one, other = della(x.copy(), weight, **own), dare_ties(x.copy(), weight, **theirs, normalize="weight")
    assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("epsilon", [0.0, 0.15])
def test_the_ends_of_density(epsilon: float) -> None:
    x, weight = deltas(1, 200), [0.9, 0.2]
    assert not della(x.copy(), weight, 0.0, epsilon, keys=KEYS).any()
    assert np.array_equal(della(x.copy(), weight, 1.0, epsilon, keys=KEYS), ties(x.copy(), weight))
    assert np.array_equal(della_linear(x.copy(), weight, 1.0, epsilon, keys=KEYS), task_arithmetic(x, weight))


@pytest.mark.parametrize("width", [10, 200])
def test_the_norm_of_what_is_kept_is_that_of_the_whole(width: int) -> None:
    x = deltas(2, 200, models=1)
    found = della_linear(x.copy(), [1.0], 0.3, keys=KEYS[:1], width=width)
    assert 0.1 < np.mean(found != 0) < 0.5
    assert np.abs(found).sum() == pytest.approx(np.abs(x).sum(), rel=1e-6)
    kept = found != 0
    assert np.ptp(found[kept] / x[0][kept]) < 1e-5
    tiny = x * np.float32(1e-12)
    assert np.array_equal(
        della_linear(tiny.copy(), [1.0], 0.3, keys=KEYS[:1]),
        della_linear(tiny.copy(), [1.0], 0.3, rescale=False, keys=KEYS[:1]),
    )


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_blocks_of_whole_rows_change_no_bit(rescale: bool, rows: int) -> None:
    x, width = deltas(3, 20 * 30), 30
    said = {"density": (0.4, 1.0), "epsilon": (0.2, 0.2), "rescale": rescale, "keys": KEYS, "width": width}

    class InBlocks:
        sizes = [min(rows * width, 600 - start) for start in range(0, 600, rows * width)]  # noqa: RUF012

        def read(self, index: int) -> Floats:
            return x[:, index * rows * width :][:, : self.sizes[index]].copy()

    source = InBlocks()
    rescaling = STATISTICS["rescaling"].compute(source, said, map)
    assert (rescaling[0] > 1) == rescale
    assert rescaling[1] == 1
    found = [
        della(source.read(index), [0.9, 0.2], **said, rescaling=rescaling, start=index * rows * width)
        for index in range(len(source.sizes))
    ]
    assert np.concatenate(found).tobytes() == della(x.copy(), [0.9, 0.2], **said).tobytes()


@pytest.mark.parametrize("method", [della, della_linear])
def test_equal_models_share_their_entries_and_zero_deltas_stay_zero(method: Any) -> None:
    x = np.repeat(deltas(4, 100, models=1), 2, axis=0)
    same = method(x.copy(), [0.5, 0.5], 0.4, normalize="none" if method is della else False, keys=(7, 7))
    alone = method(x[:1].copy(), [1.0], 0.4, keys=(7,))
    assert np.allclose(same, alone, rtol=1e-6)
    assert not method(np.zeros((2, 50), np.float32), [0.5, 0.5], 0.4, keys=KEYS).any()


def test_chances_outside_of_0_to_1_are_refused_where_the_recipe_is_read(tmp_path: Any) -> None:
    with pytest.raises(RecipeError, match=r"density of 0\.9 with an epsilon of 0\.15 makes chances from 0\.75 to 1"):
        della(deltas(1, 10), [1, 1], 0.9, keys=KEYS)
    one, other = two_llamas(tmp_path)
    recipe = {
        "merge_method": "della",
        "base_model": str(one),
        "models": [{"model": str(other), "parameters": {"weight": 1, "density": 0.1}}],
    }
    with pytest.raises(Refused) as refused:
        polymerge.plan(recipe)
    assert [str(problem) for problem in refused.value.problems] == [
        "recipe: parameters: della: a density of 0.1 with an epsilon of 0.15 makes chances from -0.05 to 0.25, which "
        "have to lie between 0 and 1. Set a smaller epsilon"
    ]
    assert cli("plan", recipe_file(recipe, tmp_path / "recipe.yaml")).status == 2
    data = polymerge.plan({**recipe, "parameters": {"epsilon": 0.05}}).to_json()
    data["settings"][0]["parameters"]["epsilon"] = [0.15]
    with pytest.raises(RecipeError, match=r"settings\[0\]: della: a density of 0\.1 with .* plan again"):
        polymerge.plan(data)
