"""Interpolation, task arithmetic and MetaGPT between architectures against the reference code of AdaMMS.

polymerge computes in float32 from what is on disk and rounds once, to the template's dtype T. The reference rounds
after every operation. With h(v), half the distance of two numbers of a dtype at v (the most that one rounding changes
v), and T, S and B for the dtypes of template, source and base on disk:

interpolation    rounds w1 x to T, w2 y to S, and their sum to T: off by at most
                   hT(w1 x) + hS(w2 y) + hT(sum of the rounded products)
task arithmetic  rounds both deltas to a dtype R of its own each (bfloat16; for LLaVA into mPLUG-Owl2 float16 and
                 float32), their mean to R, the result to a dtype E that it writes:
                   (hR(d1) + hR(d2)) / 2 + hR(mean) + hE(result)
MetaGPT          rounds each delta, each product with its model's factor, and their sum to R, the result to E:
                   f1 hR(d1) + f2 hR(d2) + hR(f1 d1) + hR(f2 d2) + hR(sum) + hE(result)
                 and its factors are off themselves: by |f' - f| times the delta. With u the relative half step of R,
                 squares are off by u each, their float32 sums by n 2^-24, rounding the sum and the total by u; so
                 numerator and denominator by 2u + n 2^-24 and 3u + n 2^-24, and the quotient is rounded once more:
                   |f' - f''| <= (6u + 2n 2^-24) f'', plus a twentieth of it for the products of small terms,
                 where f'' are exact shares of the rounded deltas. The factors that the reference printed are used.

To each come polymerge's one rounding hT(result) and those of float32 arithmetic, at most eight on either side, 2^-24 of
the magnitudes that are added up each. Every rounding counts at the size of what was rounded. That the reference rounds
there and nowhere else is not assumed: rounding so gives its values, bit by bit.

Where its mode is a defect (norms with --noLN in two of three scripts, the vocabulary of the Qwen pair) the defect is
shown, and polymerge's output is the template's tensor, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

import polymerge
from architecture_cases import CASES, Case, cases, exactly
from golden_cases import FLOAT32_STEPS, FORMATS, Floats, half_step, load
from layouts import same_bits

ELEMENTWISE = cases("task_arithmetic", "metagpt")


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory):
    """The output of a case through the public path."""

    @cache
    def run(name: str) -> dict[str, Tensor]:
        folder = tmp_path_factory.mktemp("merged") / name
        return load(polymerge.merge(CASES[name].recipe(), folder, check=False, threads=2, block=1000).folder)

    return run


def is_norm(name: str) -> bool:
    return "norm" in name


def shrunk(case: Case, name: str) -> bool:
    """Whether the reference multiplies a tensor by the template's weight and adds nothing to it."""
    if "onevision" not in case.name or case.method != "interpolation":
        return False
    return name in ("lm_head.weight", "model.embed_tokens.weight") or (case.no_norms and is_norm(name))


def doubled(case: Case, name: str) -> bool:
    """Whether the reference adds a norm to itself times the template's weight."""
    return case.no_norms and "owl_into_cog" in case.name and is_norm(name)


@pytest.mark.parametrize("name", CASES)
def test_only_what_the_reference_merges_is_touched(merged, name: str) -> None:
    case, output = CASES[name], merged(name)
    changed = {key for key in case.expected if not shrunk(case, key) and not doubled(case, key)}
    if doubled(case, "norm"):  # of this case the norms only are kept, the rest is that of the other one
        changed |= {key for key in CASES["owl_into_cog_interpolation_0.4"].expected if not is_norm(key)}
    assert output.keys() == case.template.keys()
    for key, tensor in case.template.items():
        assert (output[key].dtype, output[key].shape) == (tensor.dtype, tensor.shape)
        assert same_bits(output[key], tensor) == (key not in changed), key


# --- interpolation


def tensors(case: Case) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Every tensor that the reference interpolates: its name, the template's, the source's, the reference's."""
    for (name, expected), ours, theirs in zip(
        case.expected.items(), case.of("template"), case.of("source"), strict=True
    ):
        if not shrunk(case, name) and not doubled(case, name):
            yield name, ours, theirs, expected


def interpolation_bound(case: Case, ours: Tensor, theirs: Tensor) -> Floats:
    """How far polymerge's merge and the reference's may be apart."""
    first, second = case.weights
    rounded = [tensor * weight for tensor, weight in ((ours, first), (theirs, second))]
    parts = [weight * exactly(tensor) for tensor, weight in ((ours, first), (theirs, second))]
    bound = half_step(ours.dtype, parts[0]) + half_step(theirs.dtype, parts[1])
    bound = bound + half_step(ours.dtype, exactly(rounded[0]) + exactly(rounded[1]))
    return bound + half_step(ours.dtype, parts[0] + parts[1]) + FLOAT32_STEPS * (np.abs(parts[0]) + np.abs(parts[1]))


@pytest.mark.parametrize(
    "name", [name for name in cases("interpolation") if "owl_into_cog" not in name or "no_n" not in name]
)
def test_interpolation_is_within_the_reference_s_own_rounding(merged, name: str) -> None:
    case, output, compared = CASES[name], merged(name), 0
    first, second = case.weights
    for key, ours, theirs, expected in tensors(case):
        assert same_bits((ours * first).add_(theirs * second), expected), key
        literal = torch.tensor(first).float() * ours.float() + torch.tensor(second).float() * theirs.float()
        assert same_bits(output[key], literal.to(ours.dtype)), key
        error = np.abs(exactly(output[key]) - exactly(expected)) / interpolation_bound(case, ours, theirs)
        assert error.max() <= 1, (key, int(error.argmax()), float(error.max()))
        compared += error.size
    assert compared > 20_000


@pytest.mark.parametrize("name", ["owl_into_cog_interpolation_0.4", "onevision_into_qwen_interpolation_0.3"])
def test_the_bound_would_notice_another_weight(merged, name: str) -> None:
    """Weights that are off by a fiftieth are outside of it in many entries."""
    case, output, outside, total = CASES[name], merged(name), 0, 0
    for key, ours, theirs, expected in tensors(case):
        shifted = exactly(output[key]) + 0.02 * (exactly(ours) - exactly(theirs))
        bound = interpolation_bound(case, ours, theirs)
        outside += np.count_nonzero(np.abs(shifted - exactly(expected)) > bound)
        total += bound.size
    assert outside > total / 10


# --- where the reference's mode is a defect


def test_norms_that_are_left_out_are_the_template_s(merged) -> None:
    for name in (name for name in cases("interpolation") if CASES[name].no_norms):
        case, output = CASES[name], merged(name)
        norms = [key for key in case.template if "norm" in key and ("layers" in key or key == "model.norm.weight")]
        assert len(norms) > 6
        for key in norms:
            assert same_bits(output[key], case.template[key]), key


def test_the_reference_doubles_or_shrinks_norms_that_it_should_leave_out() -> None:
    case = CASES["owl_into_cog_interpolation_0.4_no_norms"]
    assert len(case.expected) == 7
    for name, expected in case.expected.items():
        own = case.template[name]
        assert same_bits(own + own * case.weights[0], expected), name
    case = CASES["onevision_into_qwen_interpolation_0.4_no_norms"]
    norms = {name: expected for name, expected in case.expected.items() if is_norm(name)}
    assert len(norms) == 7
    for name, expected in norms.items():
        assert same_bits(case.template[name] * case.weights[0], expected), name
    right = CASES["llava_into_owl_interpolation_0.4_no_norms"]
    assert not any(map(is_norm, right.expected)), "in the third script it is right"


@pytest.mark.parametrize("name", [name for name in cases("interpolation") if "onevision" in name])
def test_the_reference_shrinks_the_vocabulary_of_the_qwen_pair(merged, name: str) -> None:
    case, output = CASES[name], merged(name)
    for key in ("lm_head.weight", "model.embed_tokens.weight"):
        assert same_bits(case.template[key] * case.weights[0], case.expected[key])
        assert same_bits(output[key], case.template[key])


# --- task arithmetic and MetaGPT


def shares(rows: Floats) -> Floats:
    squares = np.array([np.sum(row.astype(np.float64) ** 2) for row in rows])
    return squares / squares.sum()


def factors(case: Case) -> tuple[Floats, Tensor]:
    """Each delta's factor: what it is, and what the reference has."""
    if case.method == "task_arithmetic":
        return np.array([0.5, 0.5]), torch.tensor([0.5, 0.5])
    return shares(case.deltas()), torch.tensor(case.facts["factors"], dtype=case.computed_in)


@pytest.mark.parametrize("name", cases("metagpt"))
def test_the_reference_s_factors_are_off_by_the_rounding_of_its_sums(name: str) -> None:
    case = CASES[name]
    rows = case.rows()
    rounded, printed = shares(rows.double().numpy()), case.facts["factors"]
    step = 2.0 ** -FORMATS[case.computed_in][0]
    bound = 1.05 * (6 * step + 2 * rows.shape[1] * 2.0**-24) * rounded
    assert (np.abs(np.array(printed) - rounded) <= bound).all()


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_the_reference_is_its_rounding_of_the_formula(name: str) -> None:
    case = CASES[name]
    rows, (_, theirs) = case.rows(), factors(case)
    if case.method == "metagpt":
        change = (rows * theirs[:, None]).float().sum(0).to(case.computed_in)
    else:
        change = rows.float().mean(0).to(case.computed_in)
    for key, tensor in case.joined(change).items():
        assert same_bits(tensor, case.expected[key]), key


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_polymerge_is_the_formula_rounded_once(merged, name: str) -> None:
    case, output = CASES[name], merged(name)
    first, second = (np.float32(factor) for factor in factors(case)[0])
    deltas = case.deltas()
    base = np.concatenate([exactly(tensor) for tensor in case.of("base")]).astype(np.float32)
    for key, values in case.split(base + (first * deltas[0] + second * deltas[1])).items():
        own = case.template[key]
        assert same_bits(output[key], torch.from_numpy(values).reshape(own.shape).to(own.dtype)), key


def deltas_bound(case: Case) -> Floats:
    """How far polymerge's merge and the reference's may be apart, for all changed tensors."""
    deltas, kind = case.deltas().astype(np.float64), case.computed_in
    exact, theirs = factors(case)
    base = np.concatenate([exactly(tensor) for tensor in case.of("base")])
    change = (exact[:, None] * deltas).sum(0)
    rounded = theirs.double().numpy()[:, None] * case.rows().double().numpy()
    bound = np.zeros_like(base)
    for delta, factor, other, dtype in zip(deltas, exact, theirs.double().numpy(), case.delta_types(), strict=True):
        bound += other * half_step(dtype, delta) + abs(other - factor) * np.abs(delta)
    if case.method == "metagpt":  # a mean is one rounding, a sum of products three
        bound += half_step(kind, rounded).sum(0)
    bound += half_step(kind, np.abs(rounded.sum(0)) + bound)
    bound += FLOAT32_STEPS * (np.abs(base) + np.abs(deltas).sum(0))
    for key, size in case.split(np.abs(base + change) + bound).items():
        place = case.split(bound)[key]
        place += half_step(case.expected[key].dtype, size) + half_step(case.template[key].dtype, size)
    return bound


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_sums_of_deltas_are_within_the_reference_s_own_rounding(merged, name: str) -> None:
    case, output = CASES[name], merged(name)
    error = np.abs(case.flat(output) - case.flat(case.expected)) / deltas_bound(case)
    assert error.size > 20_000
    assert error.max() <= 1, (int(error.argmax()), float(error.max()))


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_their_bound_would_notice_another_factor(merged, name: str) -> None:
    """A factor that is off by a tenth is outside of it in many entries."""
    case, output = CASES[name], merged(name)
    error = np.abs(case.flat(output) + 0.1 * case.deltas()[1] - case.flat(case.expected))
    assert np.count_nonzero(error > deltas_bound(case)) > error.size / 10
