"""DARE against the reference code of "Bring Reason to Vision": its masks bit by bit, polymerge's own by their numbers.

The reference draws its masks with torch and never scales up what it keeps. With its masks put in place of polymerge's
the sums that follow are the same, so they are compared bit by bit. Through the public path polymerge draws its own:
whatever is drawn, an entry is the base and the deltas kept there, of which there are four cases, and they happen as
often as `density` says. Output is in float32 there, so that the cases can be told apart.
"""

from __future__ import annotations

from functools import cache
from math import sqrt

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import polymerge
from polymerge.methods.dare import dare_linear, dare_ties
from polymerge.methods.sums import task_arithmetic
from polymerge.methods.ties import ties
from vlm_llm_cases import CASES, Case, Floats, Merged, cases, load

DEVIATIONS = 5
"""How far from its expectation a count may be, in standard deviations: once in 1.7 million by chance."""

DARE = cases("darelinear", "dareties")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory):
    """The output of a case in float32 through the public path."""

    @cache
    def run(name: str, rescale: bool, seed: int = 42) -> dict[str, Tensor]:
        recipe = CASES[name].recipe(rescale=rescale) | {"dtype": "float32", "seed": seed}
        return load(polymerge.merge(recipe, tmp_path_factory.mktemp("dare") / name, check=False, threads=2).folder)

    return run


@pytest.mark.parametrize("name", DARE)
def test_with_the_reference_s_masks_it_is_the_reference_bit_by_bit(name: str) -> None:
    case = CASES[name]
    kept, total = np.zeros(2), 0
    for tensor in case.tensors():
        assert tensor.masks is not None
        deltas = np.where(tensor.masks, tensor.reference_deltas(), np.float32(0))
        if case.method == "darelinear":
            results = [
                task_arithmetic(deltas.copy(), case.weights),
                dare_linear(deltas.copy(), case.weights, 1.0, rescale=False, keys=[0, 1]),
            ]
        else:
            results = [
                ties(deltas.copy(), case.weights, 1.0, "unweighted", "count"),
                dare_ties(deltas.copy(), case.weights, 1.0, False, "unweighted", "count", keys=[0, 1]),
            ]
        base = tensor.loaded["base"].float().numpy().ravel()
        for result in results:
            assert torch.equal(tensor.as_stored(base + result), tensor.expected), tensor.name
        kept += tensor.masks.sum(axis=1)
        total += deltas.shape[1]
    assert kept / total == pytest.approx(case.facts["kept"], abs=1e-6)


def outcomes(case: Case, tensor: Merged, rescale: bool) -> Floats:
    """What each entry can be: [case, n], with neither delta, the VLM's, the language model's, both."""
    deltas = tensor.deltas()
    if rescale:
        deltas *= np.float32(1 / case.facts["density"])
    parts = np.array(case.weights, np.float32)[:, None] * deltas
    both = parts[0] + parts[1]
    if case.method == "dareties":
        sign = np.where(deltas[0] + deltas[1] >= 0, 1, -1)
        agree = deltas * sign > 0
        joined = np.where(agree, parts, np.float32(0))
        both = (joined[0] + joined[1]) / np.maximum(agree.sum(axis=0), 1).astype(np.float32)
    base = tensor.stored["base"].float().numpy().ravel()
    return base + np.stack([np.zeros_like(both), parts[0], parts[1], both])


def masks_of(case: Case, output: dict[str, Tensor], rescale: bool) -> dict[str, tuple[Floats, NDArray[np.bool_]]]:
    """For each tensor, which of its four cases every entry is, and whether that is certain: the others differ."""
    found = {}
    for tensor in case.tensors():
        possible = outcomes(case, tensor, rescale)
        hits = possible == output[tensor.name].numpy().ravel()
        assert hits.any(axis=0).all(), tensor.name
        apart = [possible[i] != possible[j] for i in range(4) for j in range(i)]
        found[tensor.name] = hits.argmax(axis=0), np.all(apart, axis=0)
    return found


@pytest.mark.parametrize("name", DARE)
def test_entries_are_kept_as_often_as_density_says(drawn, name: str) -> None:
    case, density = CASES[name], CASES[name].facts["density"]
    masks = masks_of(case, drawn(name, rescale=False), rescale=False)
    which = np.concatenate([own[certain] for own, certain in masks.values()])
    assert which.size > 10_000
    deviation = sqrt(density * (1 - density) / which.size)
    for bit, recorded in zip((1, 2), case.facts["kept"], strict=True):
        share = np.count_nonzero(which & bit) / which.size
        assert abs(share - density) < DEVIATIONS * deviation
        assert abs(share - recorded) < DEVIATIONS * deviation * sqrt(2)
    both = np.count_nonzero(which == 3) / which.size
    assert abs(both - density**2) < DEVIATIONS * sqrt(density**2 * (1 - density**2) / which.size)


@pytest.mark.parametrize("name", DARE)
def test_rescaling_keeps_the_same_entries_and_multiplies_their_deltas(drawn, name: str) -> None:
    case, density = CASES[name], CASES[name].facts["density"]
    plain, scaled = drawn(name, rescale=False), drawn(name, rescale=True)
    ours, theirs = masks_of(case, plain, rescale=False), masks_of(case, scaled, rescale=True)
    for tensor in case.tensors():
        (which, certain), (again, too) = ours[tensor.name], theirs[tensor.name]
        assert np.array_equal(which[certain & too], again[certain & too])
        base = tensor.exact("base")
        small, large = (output[tensor.name].double().numpy().ravel() - base for output in (plain, scaled))
        # each output is rounded once at its own size, each delta, weight, product and quotient before it too
        size = np.abs(base) + np.abs(large) + np.abs(tensor.deltas()).sum(axis=0) / density
        assert (np.abs(large * density - small) <= 8 * 2.0**-24 * size).all(), tensor.name


def test_another_seed_keeps_other_entries_and_the_same_seed_the_same(drawn, tmp_path) -> None:
    name = DARE[0]
    case = CASES[name]
    first, second = (masks_of(case, drawn(name, False, seed), rescale=False) for seed in (42, 43))
    agree = np.concatenate([(own == second[key][0])[certain] for key, (own, certain) in first.items()])
    chance = case.facts["density"] ** 2  # one of four cases, all equally frequent at a density of 1/2
    assert chance == 0.25
    assert abs(agree.mean() - chance) < DEVIATIONS * sqrt(chance * (1 - chance) / agree.size)
    recipe = case.recipe() | {"dtype": "float32", "seed": 42}
    again = load(polymerge.merge(recipe, tmp_path / "again", check=False, threads=1, block=777).folder)
    assert all(torch.equal(again[key], drawn(name, False)[key]) for key in again)
