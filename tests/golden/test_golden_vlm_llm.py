"""Merges of a VLM with a language model against the reference code of "Bring Reason to Vision", on its own terms.

polymerge computes in float32 from what is on disk and rounds once. The reference rounds to its dtype R (float16, or
bfloat16 for the linear merges of Qwen2-VL) again and again; that is all that the two may differ by. With h(v), half the
distance of two numbers of R at v (the most that one rounding of v changes it), and R(x) for what the reference loads:

linear      loads R(x) and R(y), rounds both products and their sum, so it is off by at most
              a |R(x) - x| + b |R(y) - y| + h(a R(x)) + h(b R(y)) + h(sum)
            Each rounding counts at the size of what was rounded, not at the size of a sum that may cancel. The sum is
            taken at its largest, with the errors of the products in it.
layer swap  the same; a layer that is kept it loads as R(x), polymerge copies it byte for byte.
ties, dare  the deltas are rounded, d' = R(R(x) - R(b)), each off by at most |R(x) - x| + |R(b) - b| + h(R(x) - R(b));
            everything after that is float32. An entry is off by |R(b) - b| and what its agreeing deltas are off by,
            each times its weight, over their number.

To each come the roundings to the dtype on disk (polymerge's, and the reference's where that is not R) and those of
float32 arithmetic, at most eight on either side, 2^-24 of the magnitudes that are added up each.

A rounded delta can also change places with another one at the threshold of trimming. So the entries of TIES are told
apart by what they are made of: where a literal TIES of the rounded deltas and one of the exact deltas take the same
deltas, the bound holds; where they do not, the exact delta is shown to lie as near to the threshold (or the vote as
near to zero) as rounding can move it, and the reference's value is the literal TIES of its rounded deltas, bit by bit.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

import polymerge
from golden_cases import FLOAT32_STEPS, Bools, Floats, half_step, load
from polymerge.methods.ties import ties
from vlm_llm_cases import CASES, Case, Merged, cases


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory):
    """The output of a case through the public path."""

    @cache
    def run(name: str) -> dict[str, Tensor]:
        folder = tmp_path_factory.mktemp("merged") / name
        return load(polymerge.merge(CASES[name].recipe(), folder, check=False, threads=2, block=1000).folder)

    return run


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", CASES)
def test_only_what_the_reference_merges_is_touched(merged, name: str) -> None:
    case, output = CASES[name], merged(name)
    template, changed = case.template(), {tensor.name for tensor in case.tensors()}
    assert {key: (tensor.dtype, tensor.shape) for key, tensor in output.items()} == {
        key: (tensor.dtype, tensor.shape) for key, tensor in template.items()
    }
    for key in template.keys() - changed:
        assert bits(output[key]) == bits(template[key]), key
    (norm,) = (key for key in changed if key.endswith("norm.weight") and ".layers." not in key)
    assert bits(output[norm]) != bits(template[norm])


# --- linear


def linear_bound(case: Case, tensor: Merged) -> Floats:
    """How far polymerge's merge and the reference's may be apart."""
    (a, b), dtype, on_disk = case.weights, case.computed_in, tensor.expected.dtype
    x, y = tensor.rounded("vlm"), tensor.rounded("llm")
    loading = a * np.abs(x - tensor.exact("vlm")) + b * np.abs(y - tensor.exact("llm"))
    products = half_step(dtype, a * x) + half_step(dtype, b * y)
    largest = np.abs(a * x + b * y) + loading + products
    total = loading + products + half_step(dtype, largest) + FLOAT32_STEPS * (a * np.abs(x) + b * np.abs(y))
    if on_disk == torch.float32:
        return total
    largest = largest + half_step(dtype, largest)
    return total + half_step(on_disk, largest) * (1 if on_disk == dtype else 2)


@pytest.mark.parametrize("name", cases("base", "layerswap"))
def test_linear_is_within_the_reference_s_own_rounding(merged, name: str) -> None:
    case, output = CASES[name], merged(name)
    swapped = case.facts.get("base_layer_num", -1)
    compared = 0
    for tensor in case.tensors():
        if tensor.layer is not None and tensor.layer <= swapped:
            assert torch.equal(output[tensor.name], tensor.stored["vlm"])
            assert torch.equal(tensor.loaded["vlm"].to(tensor.expected.dtype), tensor.expected)
            continue
        error = np.abs(output[tensor.name].double().numpy() - tensor.expected.double().numpy()).ravel()
        excess = error / linear_bound(case, tensor)
        assert excess.max() <= 1, (tensor.name, int(excess.argmax()), float(excess.max()))
        compared += error.size
    assert compared > 7000


@pytest.mark.parametrize("name", cases("base"))
def test_the_bound_would_notice_another_weight(merged, name: str) -> None:
    """Weights that are off by a hundredth are outside of it in many entries."""
    case, output = CASES[name], merged(name)
    outside, total = 0, 0
    for tensor in case.tensors():
        shifted = output[tensor.name].double().numpy().ravel() + 0.01 * (tensor.exact("vlm") - tensor.exact("llm"))
        outside += np.count_nonzero(
            np.abs(shifted - tensor.expected.double().numpy().ravel()) > linear_bound(case, tensor)
        )
        total += shifted.size
    assert outside > total / 4


# --- TIES


def kept(deltas: Floats, density: float) -> Bools:
    """Which entries of each row are the `int(density * n)` largest, or equal to the least of them."""
    sizes = np.abs(deltas)
    least = np.sort(sizes, axis=1)[:, -int(density * deltas.shape[1])]
    result: Bools = sizes >= least[:, None]
    return result


def agreeing(deltas: Floats, keep: Bools) -> Bools:
    """Which entries survive trimming and have the elected sign: plus where the sum is not negative."""
    trimmed = np.where(keep, deltas, np.float32(0))
    sign = np.where(trimmed.sum(axis=0) >= 0, 1, -1)
    return trimmed * sign > 0


def joined(deltas: Floats, weights: tuple[float, float], agree: Bools) -> Floats:
    """The mean of what agrees, each times its weight, in float32 and in the models' order."""
    parts = np.where(agree, np.array(weights, np.float32)[:, None] * deltas, np.float32(0))
    return (parts[0] + parts[1]) / np.maximum(agree.sum(axis=0), 1).astype(np.float32)


@pytest.mark.parametrize("name", cases("ties"))
def test_ties_is_the_literal_loop(merged, name: str) -> None:
    case, output = CASES[name], merged(name)
    for tensor in case.tensors():
        deltas = tensor.deltas()
        change = joined(deltas, case.weights, agreeing(deltas, kept(deltas, case.facts["density"])))
        literal = tensor.as_stored(tensor.stored["base"].float().numpy().ravel() + change)
        assert torch.equal(output[tensor.name], literal), tensor.name


@pytest.mark.parametrize("name", cases("ties"))
def test_ties_of_the_reference_s_deltas_is_the_reference_bit_by_bit(name: str) -> None:
    """Where its sort decides among equals, what it has is what TIES gives with them kept or with them dropped."""
    case, undecided = CASES[name], 0
    for tensor in case.tensors():
        deltas = tensor.reference_deltas()
        base = tensor.loaded["base"].float().numpy().ravel()
        change = ties(deltas.copy(), case.weights, case.facts["density"], "unweighted", "count")
        free = np.zeros(deltas.shape, bool)
        for row, places in zip(free, tensor.equals, strict=True):
            row[places] = True
        same = (tensor.as_stored(base + change) == tensor.expected).numpy().ravel()
        assert same[~free.any(axis=0)].all(), tensor.name
        keep, possible = kept(deltas, case.facts["density"]), np.zeros(len(same), bool)
        for first in (False, True):
            for second in (False, True):
                chosen = np.where(free, np.array([[first], [second]]), keep)
                result = tensor.as_stored(base + joined(deltas, case.weights, agreeing(deltas, chosen)))
                possible |= (result == tensor.expected).numpy().ravel()
        assert possible.all(), tensor.name
        undecided += int(free.any(axis=0).sum())
    assert undecided > 0


def delta_errors(case: Case, tensor: Merged) -> Floats:
    """How far the reference's deltas [model, n] may be from the exact ones."""
    base, off = tensor.rounded("base"), np.abs(tensor.rounded("base") - tensor.exact("base"))
    errors = []
    for role in ("vlm", "llm"):
        own = tensor.rounded(role)
        subtracting = half_step(case.computed_in, own - base) + half_step(torch.float32, own - base)
        errors.append(np.abs(own - tensor.exact(role)) + off + subtracting)
    return np.stack(errors)


def ties_bound(case: Case, tensor: Merged, agree: Bools, size: Floats) -> Floats:
    """How far polymerge's merge and the reference's may be apart where both join the same deltas."""
    weights = np.array(case.weights)[:, None]
    bound = np.abs(tensor.rounded("base") - tensor.exact("base"))
    bound = bound + (weights * delta_errors(case, tensor) * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
    magnitudes = np.abs(tensor.exact("base")) + (weights * np.abs(tensor.deltas())).sum(axis=0)
    bound = bound + FLOAT32_STEPS * magnitudes
    on_disk = tensor.expected.dtype
    return bound if on_disk == torch.float32 else bound + 2 * half_step(on_disk, size + bound)


@pytest.mark.parametrize(("name", "swapped"), [("idefics2_ties", 6), ("llavanext_ties", 1), ("qwen2vl_ties", 0)])
def test_ties_differs_only_by_rounding_and_by_what_rounding_swaps(merged, name: str, swapped: int) -> None:
    case, output = CASES[name], merged(name)
    density, found = case.facts["density"], 0
    for tensor in case.tensors():
        exact, theirs = tensor.deltas(), tensor.reference_deltas()
        keep, agree = kept(exact, density), agreeing(exact, kept(exact, density))
        same = (agree == agreeing(theirs, kept(theirs, density))).all(axis=0)
        decided = np.ones(exact.shape[1], bool)
        for places in tensor.equals:
            decided[places] = False
        ours, reference = (values.double().numpy().ravel() for values in (output[tensor.name], tensor.expected))
        excess = np.abs(ours - reference) / ties_bound(case, tensor, agree, np.maximum(np.abs(ours), np.abs(reference)))
        assert excess[same & decided].max(initial=0) <= 1, tensor.name

        # what is joined differs: only where rounding can have moved a delta across the threshold, or the vote
        errors = delta_errors(case, tensor)
        threshold = np.where(keep, np.abs(exact), np.inf).min(axis=1, keepdims=True)
        at_threshold = np.abs(np.abs(exact) - threshold) <= errors + errors.max(axis=1, keepdims=True)
        even_vote = np.abs(np.where(keep, exact, 0).sum(axis=0)) <= errors.sum(axis=0)
        assert (at_threshold.any(axis=0) | even_vote)[~same & decided].all(), tensor.name
        found += np.count_nonzero(~same & decided)
    assert found == swapped
