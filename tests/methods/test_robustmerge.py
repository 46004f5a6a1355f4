"""RobustMerge against loops written from the paper, and against what its released code computes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from low_rank import adapters, dense
from paths import GOLDEN
from polymerge.errors import RecipeError
from polymerge.methods.lora import Factors
from polymerge.methods.robustmerge import robustmerge

ADAPTERS = GOLDEN / "adapters"
CASES = json.loads((ADAPTERS / "cases.json").read_text())
VECTORS = json.loads((ADAPTERS / "vectors.json").read_text())["robustmerge"]

few = settings(max_examples=20)
seeds = st.integers(0, 999)


# --- literal loops


def prune(x, density):
    order = sorted(abs(float(value)) for value in x.ravel())
    place = int(len(order) * (1 - density))
    threshold = order[place - 1] if place else 0.0
    result = np.zeros(x.shape)
    for at in np.ndindex(x.shape):
        if abs(float(x[at])) >= threshold:
            result[at] = x[at]
    return result


def rank_scales(a, density, floor):
    kept = prune(a, density)
    scales = [sum(abs(a[i].astype(float))) / sum(abs(kept[i])) for i in range(len(a))]
    if floor is not None:
        lowest = sorted(scales)[int(len(a) * floor)]
        scales = [max(scale, lowest) for scale in scales]
    return scales


def literal(pairs, density, scale, floor, compose):
    """The update, [out, in]."""
    scales = [rank_scales(pair.a, density, floor) for pair in pairs]
    total = np.sum(scales, axis=0)
    left = [prune(p.b, density) * (np.array(s) / total) for p, s in zip(pairs, scales, strict=True)]
    right = [prune(pair.a, density) for pair in pairs]
    if compose == "product":
        return scale * sum(b @ a for b, a in zip(left, right, strict=True))
    return (scale * sum(left)) @ (scale * sum(right))


@few
@given(
    seeds,
    st.sampled_from([0.2, 0.25, 0.5, 0.9, 1.0]),
    st.sampled_from([None, 0.0, 0.5, 0.8]),
    st.sampled_from(["factors", "product"]),
    st.integers(1, 5),
)
def test_it_is_the_literal_loop(seed, density, floor, compose, rank):
    pairs = adapters(seed, 12, 40, (rank,) * 3)
    merged = robustmerge(pairs, density, 1.5, floor, compose)
    assert merged.rank == (rank if compose == "factors" else 3 * rank)
    wanted = literal(pairs, density, 1.5, floor, compose)
    np.testing.assert_allclose(dense(merged), wanted, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("compose", ["factors", "product"])
@few
@given(seeds, st.permutations(range(3)))
def test_order_does_not_matter(compose, seed, order):
    pairs = adapters(seed, 12, 20, (3, 3, 3))
    wanted = dense(robustmerge(pairs, compose=compose))
    reordered = dense(robustmerge([pairs[i] for i in order], compose=compose))
    np.testing.assert_allclose(reordered, wanted, atol=1e-6 * np.abs(wanted).max())


def test_one_adapter_whole_is_itself():
    (pair,) = adapters(0, ranks=(3,))
    for compose in ("factors", "product"):
        merged = robustmerge([pair], 1.0, 1.0, None, compose)
        np.testing.assert_array_equal(merged.b, pair.b)
        np.testing.assert_array_equal(merged.a, pair.a)


def test_equal_adapters():
    """Their shares are 1 / T: a sum of products is scale times the pruned one; A is T-fold where factors add up."""
    (pair,) = adapters(1, ranks=(3,))
    pruned = prune(pair.b, 0.2) @ prune(pair.a, 0.2)
    np.testing.assert_allclose(dense(robustmerge([pair] * 4, compose="product")), 2 * pruned, atol=1e-6)
    np.testing.assert_allclose(dense(robustmerge([pair] * 4)), 4 * 4 * pruned, atol=1e-5)


def test_what_is_equal_to_the_threshold_stays():
    a = np.array([[1, 2, 2, 3, 2]], np.float32)
    b = np.ones((3, 1), np.float32)
    # of 5 entries int(5 * 0.8) = 4 the 4th smallest, 2, is the threshold
    merged = robustmerge([Factors(b, a)], 0.2, 1.0)
    np.testing.assert_array_equal(merged.a, [[0, 2, 2, 3, 2]])
    np.testing.assert_array_equal(merged.b, b)
    np.testing.assert_array_equal(robustmerge([Factors(b, a)], 0.0, 1.0).a, [[0, 0, 0, 3, 0]])


def test_more_zeros_than_are_pruned_keep_everything_else():
    b = np.zeros((10, 1), np.float32)
    b[3] = 1e-3
    a = np.ones((1, 4), np.float32)
    np.testing.assert_array_equal(robustmerge([Factors(b, a)], scale=1.0).b, b)


def test_rows_of_which_nothing_is_left_get_a_scale():
    a = np.array([[9, 8, 7, 6, 5], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [9, 1, 1, 1, 1]], np.float32)
    b = np.ones((2, 4), np.float32)
    live = np.array([[9, 8, 7, 6, 5], [9, 9, 9, 9, 9], [9, 8, 7, 6, 5], [5, 1, 1, 9, 9]], np.float32)
    one, two = Factors(b, a), Factors(b, live)
    merged = robustmerge([one, two], 0.2, 1.0, None)
    # by hand: of 20 entries the 16th smallest is the threshold, 6 in the one and 9 in the other
    first = np.array([35 / 30, 13 / 9, 1.0, 13 / 9])  # the row without a survivor has the largest, the zero row 1
    second = np.array([35 / 9, 1.0, 35 / 9, 25 / 18])
    np.testing.assert_array_equal(merged.a[1], prune(live, 0.2)[1])
    np.testing.assert_array_equal(merged.a[2], prune(live, 0.2)[2])
    np.testing.assert_allclose(merged.b, np.tile((first + second) / (first + second), (2, 1)), rtol=1e-6)


@pytest.mark.parametrize("compose", ["factors", "product"])
@pytest.mark.parametrize("floor", [None, 0.8, 1.0])
def test_dead_ranks_and_untrained_adapters_give_zeros(compose, floor):
    pairs = [Factors(pair.b, pair.a.copy()) for pair in adapters(2, ranks=(3, 3))]
    for pair in pairs:
        pair.a[1] = 0
    merged = robustmerge(pairs, floor=floor, compose=compose)
    assert not merged.a[1::3].any()
    assert np.isfinite(merged.b).all()
    blank = [Factors(np.zeros_like(pair.b), np.zeros_like(pair.a)) for pair in pairs]
    merged = robustmerge(blank, floor=floor, compose=compose)
    assert not merged.b.any()
    assert not merged.a.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 1.5}, "density: 1.5"),
        ({"density": float("nan")}, "density: nan"),
        ({"floor": -0.1}, "floor: -0.1"),
        ({"scale": float("inf")}, "scale: inf is not finite"),
        ({"compose": "both"}, "compose: 'both' is not one of factors, product"),
    ],
)
def test_errors(change, message):
    with pytest.raises(RecipeError, match=message):
        robustmerge(adapters(3, ranks=(2, 2)), **change)


@pytest.mark.parametrize("compose", ["factors", "product"])
def test_unequal_ranks_are_refused(compose):
    with pytest.raises(RecipeError, match=r"adapter 1: has rank 3, adapter 0 has rank 2.* such as svd"):
        robustmerge(adapters(4, ranks=(2, 3)), compose=compose)


# --- the released code


def vectors():
    return [
        Factors(np.array(x["lora_B.weight"], np.float32), np.array(x["lora_A.weight"], np.float32))
        for x in VECTORS["inputs"]
    ]


def test_the_vectors_of_the_code_and_of_the_paper():
    merged, code = robustmerge(vectors()), VECTORS["reference_code"]
    np.testing.assert_allclose(merged.a, code["lora_A.weight"], atol=1e-6)
    np.testing.assert_allclose(merged.b, code["lora_B.weight"], atol=1e-6)
    products = robustmerge(vectors(), floor=None, compose="product")
    np.testing.assert_allclose(dense(products), VECTORS["paper_delta_sum_of_products_lambda2"], atol=1e-6)
    sums = robustmerge(vectors(), floor=None, scale=2**0.5)  # in each factor: 2 in the update
    np.testing.assert_allclose(dense(sums), VECTORS["paper_delta_product_of_sums_lambda2"], atol=2e-6)


def modules(name):
    """Of each module the adapters' factors, and the reference's merged A and B."""
    folder = ADAPTERS / name
    inputs = [
        torch.load(folder / "inputs" / adapter / "adapter_model.bin", weights_only=True)
        for adapter in CASES[name]["adapters"]
    ]
    expected = load_file(folder / "expected" / "adapter_model.safetensors")
    for key in expected:
        if ".lora_A." in key:
            other = key.replace(".lora_A.", ".lora_B.")
            pairs = [Factors(x[other].float().numpy(), x[key].float().numpy()) for x in inputs]
            yield pairs, expected[key].numpy(), expected[other].numpy()


def within(got, wanted, tolerance):
    limit = tolerance["rtol"] * np.abs(wanted) + tolerance["atol_rel_to_max"] * np.abs(wanted).max()
    return bool((np.abs(got - wanted) <= limit).all())


@pytest.mark.parametrize("name", CASES)
def test_the_released_code(name):
    tolerance, count = CASES[name]["tolerance"], 0
    for pairs, a, b in modules(name):
        merged = robustmerge(pairs, **CASES[name]["parameters"])
        if tolerance["lora_A"]["mode"] == "bitwise":
            np.testing.assert_array_equal(merged.a, a)
        assert within(merged.a, a, tolerance["lora_A"])
        assert within(merged.b, b, tolerance["lora_B"])
        assert ((merged.a == 0) == (a == 0)).all()
        assert ((merged.b == 0) == (b == 0)).all()
        count += 1
    assert count == {"r4_T2_bf16": 14, "r16_T3_bf16": 7, "r16_T8_fp32": 3}[name]


@pytest.mark.parametrize("name", CASES)
def test_an_entry_differs_only_by_the_rounding_of_scales(name):
    """Of a share S / sum S, with u the rounding of the adapters' dtype: S is a quotient of two sums, each rounded, so
    off by 3 u; the sum of S the same and, rounded after every addition at worst, T - 1 more. An entry of B is a sum of
    2 * share * B~, so off by (3 + 3 + T - 1) u of the sum of magnitudes, and float32 rounding beside it."""
    step = 2.0**-8 if CASES[name]["on_disk"] == "bfloat16" else 2.0**-24
    for pairs, _, b in modules(name):
        parameters = CASES[name]["parameters"]
        merged = robustmerge(pairs, **parameters)
        scales = [rank_scales(pair.a, parameters["density"], parameters["floor"]) for pair in pairs]
        shares = np.array(scales) / np.sum(scales, axis=0)
        size = 2 * sum(s * np.abs(prune(p.b, 0.2)) for s, p in zip(shares, pairs, strict=True))
        steps = (5 + len(pairs)) * step + 2 * len(pairs) * 2.0**-24
        # a sum over m entries in float32 is off by more than its last rounding
        summing = 0 if step > 2.0**-24 else 4 * np.log2(pairs[0].a.shape[1]) * 2.0**-24
        assert (np.abs(merged.b - b) <= (steps + summing) * size).all()


def test_the_bounds_would_notice():
    pairs, a, b = next(modules("r16_T3_bf16"))
    tolerance = CASES["r16_T3_bf16"]["tolerance"]
    for change in ({"density": 0.19}, {"floor": None}, {"scale": 1.9}):
        merged = robustmerge(pairs, **(CASES["r16_T3_bf16"]["parameters"] | change))
        assert not (within(merged.a, a, tolerance["lora_A"]) and within(merged.b, b, tolerance["lora_B"])), change
