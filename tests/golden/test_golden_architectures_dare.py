"""DARE between architectures through the public path: the numbers of polymerge's own masks, against the reference's.

Whatever is drawn, an entry is the base and the rescaled deltas kept there, of which there are four cases, and they
happen as often as `density` says; the recorded masks of the reference do too. Output is in float32 here, so that the
cases can be told apart. Its arithmetic on the reference's masks is in test_golden_architectures_ties.py.
"""

from __future__ import annotations

from functools import cache
from math import sqrt

import numpy as np
import pytest

import polymerge
from architecture_cases import CASES, Case, cases, exactly
from golden_cases import DEVIATIONS, Bools, Floats, load

DARE = cases("dare_linear", "dare_ties")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory):
    """The output of a case, flat, in float32."""

    @cache
    def run(name: str, seed: int = 42) -> Floats:
        recipe = CASES[name].recipe() | {"dtype": "float32", "seed": seed}
        folder = tmp_path_factory.mktemp("dare") / name
        output = load(polymerge.merge(recipe, folder, check=False, threads=2, block=1000).folder)
        return CASES[name].flat(output).astype(np.float32)

    return run


def outcomes(case: Case) -> Floats:
    """What each entry can be [case, n]: with neither delta, the template's, the source's, both."""
    deltas = case.deltas() * np.float32(1 / case.density)
    if case.method == "dare_linear":
        first, second = np.float32(0.5) * deltas
        both = first + second
    else:
        first, second = deltas
        agree = np.where(first + second >= 0, deltas > 0, deltas < 0)
        both = np.where(agree[0], first, np.float32(0)) + np.where(agree[1], second, np.float32(0))
    base = np.concatenate([exactly(tensor) for tensor in case.of("base")]).astype(np.float32)
    return base + np.stack([np.zeros_like(first), first, second, both])


def masks_of(case: Case, output: Floats) -> tuple[Floats, Bools]:
    """Which of its four cases every entry is, and whether that is certain: the others differ."""
    possible = outcomes(case)
    hits = possible == output
    assert hits.any(axis=0).all()
    apart = [possible[i] != possible[j] for i in range(4) for j in range(i)]
    return hits.argmax(axis=0), np.all(apart, axis=0)


@pytest.mark.parametrize("name", DARE)
def test_entries_are_kept_as_often_as_density_says(drawn, name: str) -> None:
    case, density = CASES[name], CASES[name].density
    which, certain = masks_of(case, drawn(name))
    which = which[certain]
    # of two deltas of opposite sign the elected one is what it would be alone: not certain, for DARE with election
    assert which.size > certain.size / (3 if case.method == "dare_ties" else 1.2)
    for bit, recorded, mask in zip((1, 2), case.facts["kept"], case.masks, strict=True):
        assert mask.mean() == pytest.approx(recorded, abs=1e-6)
        share = np.count_nonzero(which & bit) / which.size
        assert abs(share - density) < DEVIATIONS * sqrt(density * (1 - density) / which.size)
        # the reference draws in the dtype of its deltas, to which the density is rounded
        spread = sqrt(density * (1 - density) * (1 / which.size + 1 / mask.size))
        assert abs(share - recorded) < DEVIATIONS * spread + density * 2.0**-8
    both = np.count_nonzero(which == 3) / which.size
    assert abs(both - density**2) < DEVIATIONS * sqrt(density**2 * (1 - density**2) / which.size)


@pytest.mark.parametrize("name", [name for name in DARE if "linear" in name])
def test_experts_draw_apart_from_each_other(drawn, name: str) -> None:
    """Tensors that take the same source twice have masks of their own for each branch."""
    case, density = CASES[name], CASES[name].density
    which, certain = masks_of(case, drawn(name))
    parts, sure = case.split(which), case.split(certain)
    twins = [
        (key, key.replace("language_expert", "vision_expert").replace("multiway.0", "multiway.1")) for key in parts
    ]
    twins = [(one, other) for one, other in twins if one != other]
    agree = np.concatenate([(parts[a] == parts[b])[sure[a] & sure[b]] for a, b in twins] or [np.zeros(0)])
    assert (agree.size == 0) == ("onevision" in name)
    if agree.size:
        chance = (density**2 + (1 - density) ** 2) ** 2
        assert abs(agree.mean() - chance) < DEVIATIONS * sqrt(chance * (1 - chance) / agree.size)


def test_the_seed_decides_and_threads_do_not(drawn, tmp_path) -> None:
    name = DARE[0]
    first, second = drawn(name), drawn(name, 43)
    assert not np.array_equal(first, second)
    recipe = CASES[name].recipe() | {"dtype": "float32"}
    again = load(polymerge.merge(recipe, tmp_path / "again", check=False, threads=1, block=77).folder)
    assert np.array_equal(CASES[name].flat(again).astype(np.float32), first)
