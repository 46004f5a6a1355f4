"""The methods against loops written from the papers, what must hold of them, and the table of methods."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from literal_methods import elected, largest
from paths import GOLDEN
from polymerge.engine.statistics import STATISTICS
from polymerge.errors import RecipeError
from polymerge.methods.dare import dare_linear, dare_ties
from polymerge.methods.directions import arc_weights, slerp
from polymerge.methods.kernels import encode, find_cutoffs, on_host
from polymerge.methods.method import method_function
from polymerge.methods.sums import linear, task_arithmetic
from polymerge.methods.table import METHODS
from polymerge.methods.ties import kept, ties

VECTORS = json.loads((GOLDEN / "vectors.json").read_text())
ROWS = [row for row in METHODS.values() if row.on in ("weights", "deltas")]

relaxed = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 999)


def numbers(seed, models, n, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (models, n))
    x[:, ::2] = np.round(x[:, ::2] * 2) / 4
    return x.astype(dtype)


def arguments(name, models, density=0.5):
    """Something for each parameter of a method that has no default, and a density where it has one."""
    row = METHODS[name]
    given = {"weight": [0.9, 0.2, 0.4][:models], "t": 0.3, "density": density}
    chosen = {parameter.name: given[parameter.name] for parameter in row.parameters if parameter.name in given}
    return chosen | ({"keys": [11, 22, 33][:models]} if row.random else {})


def beside(row, x):
    """What a method is given beside its block `x`: the base, as an array of its kind."""
    base = np.linspace(-1, 1, x.shape[1], dtype=str(x.dtype).removeprefix("torch."))
    return {"base": base if isinstance(x, np.ndarray) else torch.from_numpy(base)} if row.sees_base else {}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tensors_give_the_bits_of_arrays(row, dtype):
    models = row.models or 2
    x = numbers(1, models, 5000, dtype)
    function, chosen = method_function(row), arguments(row.name, models)
    mine, theirs = (function(y, **chosen, **beside(row, y)) for y in (x.copy(), torch.from_numpy(x.copy())))
    assert mine.dtype == dtype
    assert mine.tobytes() == on_host(theirs).tobytes()


@pytest.mark.parametrize("row", [row for row in ROWS if row.by_row is not True], ids=lambda row: row.name)
@pytest.mark.parametrize("block", [1, 7, 1000, 4999])
def test_blocks_give_the_bits_of_the_whole(row, block):
    models = row.models or 2
    x = numbers(2, models, 5000)
    if block == 1:
        x = x[:, :40].copy()
    n = x.shape[1]
    function, chosen = method_function(row), arguments(row.name, models)
    whole = function(x.copy(), **chosen)
    if row.statistic == "gram":
        wide = x.astype(np.float64)
        chosen["gram"] = wide @ wide.T
        whole = function(x.copy(), **chosen)
    elif row.statistic is not None:
        source = SimpleNamespace(sizes=[n], read=lambda _: x.copy())
        said = {p.name: (p.default,) * models if p.each else p.default for p in row.parameters}
        said |= {name: (value,) * models if name == "density" else value for name, value in chosen.items()}
        chosen[row.statistic] = STATISTICS[row.statistic].compute(source, said, map)
    parts = []
    for start in range(0, n, block):
        place = {"start": start} if row.random else {}
        parts.append(function(x[:, start : start + block].copy(), **chosen, **place))
    assert np.concatenate(parts).tobytes() == whole.tobytes()


# ---- against the papers


def literal_ties(deltas, weight, density, elect, normalize):
    """Algorithm 1 of the paper, entry by entry, with the choices that this package documents."""
    return elected([largest(row, share) for row, share in zip(deltas, density, strict=True)], weight, elect, normalize)


@pytest.mark.parametrize("elect", ["weighted", "unweighted"])
@pytest.mark.parametrize("normalize", ["weight", "count", "none"])
@pytest.mark.parametrize("density", [[0.2, 0.2, 0.2], [0.0, 0.5, 1.0]])
def test_ties_is_the_papers(elect, normalize, density):
    x, weight = numbers(3, 3, 101, np.float64), [0.9, 0.2, 0.4]
    expected = literal_ties(x, weight, density, elect, normalize)
    np.testing.assert_allclose(ties(x, weight, density, elect, normalize), expected, rtol=1e-13)


def test_ties_of_bring_reason_to_vision():
    """Zero votes elect plus, zeros agree with nothing, the count divides: an example worked by hand."""
    deltas = np.array([[1, -2, 3, 0.5], [-1, 2, 3, 0]])
    merged = ties(deltas, [0.9, 0.2], 1.0, elect="unweighted", normalize="count")
    np.testing.assert_allclose(merged, [0.9, 0.4, 1.65, 0.45], rtol=1e-15)


def test_ties_has_the_numbers_of_the_reference():
    case = VECTORS["vlm_ties"]
    deltas = np.array(case["inputs"], np.float32).reshape(2, -1)
    merged = ties(deltas, case["weights"], case["density"], elect="unweighted", normalize="count")
    np.testing.assert_allclose(merged, np.ravel(case["reference_code"]), atol=1e-7)


def test_ties_over_a_whole_model_has_the_numbers_of_the_reference():
    """AdaMMS trims all tensors together, in the order of their names, and keeps one entry more than it is asked to."""
    case = VECTORS["adamms"]
    whole = np.array([np.concatenate([np.ravel(model[name]) for name in "ab"]) for model in case["inputs"]])
    cutoffs = find_cutoffs(whole, [6, 6])
    for name in "ab":
        deltas = np.array([np.ravel(model[name]) for model in case["inputs"]])
        merged = ties(deltas, 1.0, elect="unweighted", normalize="none", cutoff=cutoffs)
        np.testing.assert_allclose(merged, np.ravel(case["ties_sum_K0.5"][name]), atol=1e-12)


def test_task_arithmetic_has_the_numbers_of_the_references():
    deltas = np.array(VECTORS["vlm_ties"]["inputs"]).reshape(2, -1)
    np.testing.assert_allclose(
        task_arithmetic(deltas, [0.9, 0.2]), np.ravel(VECTORS["vlm_task_arithmetic"]), atol=1e-12
    )
    case = VECTORS["adamms"]
    for name in "ab":
        deltas = np.array([np.ravel(model[name]) for model in case["inputs"]])
        np.testing.assert_allclose(task_arithmetic(deltas, 0.5), np.ravel(case["task_arithmetic"][name]), atol=1e-12)


def test_dare_with_the_draws_written_out():
    x, weight, keys = numbers(4, 2, 400, np.float64), [0.7, 0.3], [5, 6]
    thinned = np.zeros_like(x)
    for row, key, out in zip(np.ones_like(x), keys, thinned, strict=True):
        out[:] = dare_linear(row[None].copy(), 1.0, 0.25, rescale=False, keys=[key])
    assert 0.15 < thinned.mean() < 0.35
    thinned *= x
    for rescale, factor in ((True, 4.0), (False, 1.0)):
        chosen = {"density": 0.25, "rescale": rescale, "keys": keys}
        np.testing.assert_allclose(
            dare_linear(x.copy(), weight, **chosen), factor * (0.7 * thinned[0] + 0.3 * thinned[1]), rtol=1e-12
        )
        np.testing.assert_allclose(
            dare_ties(x.copy(), weight, **chosen, elect="unweighted", normalize="count"),
            literal_ties(factor * thinned, weight, [1.0, 1.0], "unweighted", "count"),
            rtol=1e-12,
        )


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_follows_the_arc(t):
    x = numbers(5, 2, 300, np.float64)
    lengths = np.linalg.norm(x, axis=1)
    angle = math.acos(x[0] @ x[1] / lengths.prod())
    expected = (math.sin((1 - t) * angle) * x[0] + math.sin(t * angle) * x[1]) / math.sin(angle)
    np.testing.assert_allclose(slerp(x, t), expected, rtol=1e-9, atol=1e-12)
    unit = x / lengths[:, None]
    np.testing.assert_allclose(np.linalg.norm(slerp(unit, t)), 1.0, rtol=1e-9)


def test_slerp_goes_straight_where_there_is_no_arc():
    x = numbers(6, 1, 50)
    for second in (x * np.float32(1.5), x * np.float32(-1)):
        np.testing.assert_allclose(slerp(np.vstack([x, second]), 0.25), 0.75 * x[0] + 0.25 * second[0], rtol=1e-6)
    # what has no direction counts as orthogonal to the other, as in mergekit
    for second in (np.zeros_like(x), np.full_like(x, 1e-10)):
        np.testing.assert_allclose(slerp(np.vstack([x, second]), 0.5), x[0] * math.sqrt(0.5), rtol=1e-6, atol=1e-9)
    assert not slerp(np.zeros_like(np.vstack([x, x])), 0.5).any()
    assert arc_weights(np.array([[1e300, 0.0], [0.0, 1e300]]), 0.5) == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)))


# ---- what must hold of them


@relaxed
@given(seeds, st.sampled_from(["BF16", "F16"]), st.sampled_from([(0.5, 0.5), (0.9, 0.1), (1.0, 2.0), (0.3, 0.7)]))
def test_equal_models_give_the_model_back(seed, dtype, weight):
    halves = torch.randn(200, generator=torch.Generator().manual_seed(seed)).to(
        {"BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    )
    x = np.tile(halves.float().numpy(), (2, 1))
    for merged in (linear(x.copy(), weight), slerp(x.copy(), 0.3)):
        np.testing.assert_array_max_ulp(merged, x[0], maxulp=2)
        out = np.empty(400, np.uint8)
        encode(merged, dtype, out)
        np.testing.assert_array_equal(out, halves.view(torch.uint8).numpy())
    np.testing.assert_array_max_ulp(ties(x.copy(), weight), x[0], maxulp=2)


@relaxed
@given(seeds, st.integers(1, 200), st.sampled_from(["ties", "dare_linear", "dare_ties"]))
def test_the_ends_of_density(seed, n, name):
    x, function = numbers(seed, 2, n), method_function(METHODS[name])
    nothing = function(x.copy(), **arguments(name, 2, density=0.0))
    assert (nothing == 0).all()
    everything = function(x.copy(), **arguments(name, 2, density=1.0))
    weight = arguments(name, 2)["weight"]
    divided = "weight" if name == "ties" else "none"
    plain = task_arithmetic(x, weight) if name == "dare_linear" else ties(x.copy(), weight, normalize=divided)
    np.testing.assert_array_equal(everything, plain)


@relaxed
@given(seeds, st.permutations([0, 1, 2]), st.sampled_from([row.name for row in ROWS if row.models is None]))
def test_the_order_of_models_does_not_matter(seed, order, name):
    x, function, chosen = numbers(seed, 3, 100, np.float64), method_function(METHODS[name]), arguments(name, 3)
    reordered = {key: [value[i] for i in order] if isinstance(value, list) else value for key, value in chosen.items()}
    np.testing.assert_allclose(function(x[order].copy(), **reordered), function(x.copy(), **chosen), atol=1e-12)


@relaxed
@given(seeds, st.floats(0, 1), st.integers(1, 500))
def test_ties_keeps_what_reaches_the_threshold_and_nothing_else(seed, density, n):
    x = numbers(seed, 1, n)
    x[x == 0] = 0.25
    sizes = np.abs(x[0])
    asked = max(int(density * n), density > 0)
    left = ties(x.copy(), 1.0, density) != 0
    reach = sizes[left].min(initial=np.inf)
    np.testing.assert_array_equal(left, sizes >= reach)
    assert np.count_nonzero(sizes > reach) < max(asked, 1) <= max(np.count_nonzero(left), 1)
    assert left.any() == (asked > 0)


def test_kept_is_the_product_cut_off_and_one_at_least():
    assert kept(0.29, 1, 1600) == [463]
    assert kept([0.2, 1.0, 0.0], 3, 10) == [2, 10, 0]
    assert kept([0.01, 1e-9, 0.0], 3, 64) == [1, 1, 0]


def test_shares_are_those_of_the_exact_sum():
    x = np.eye(3, 3, dtype=np.float64)
    np.testing.assert_array_equal(linear(x, [1.0, 2.0, 5.0]), [0.125, 0.25, 0.625])
    np.testing.assert_array_equal(linear(x, [1.0, 2.0, 5.0], normalize=False), [1.0, 2.0, 5.0])
    np.testing.assert_array_equal(task_arithmetic(x, [3.0, 3.0, 6.0], normalize=True), [0.25, 0.25, 0.5])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: linear(x, [1.0, -1.0]), r"add up to about 0"),
        (lambda x: linear(x, [1.0]), r"1 values for 2 models"),
        (lambda x: ties(x, 1.0, 1.5), r"density: 1.5 is not in \[0, 1\]"),
        (lambda x: ties(x, 1.0, [0.1, -0.1]), r"density: -0.1"),
        (lambda x: ties(x, [1.0, math.nan]), r"weight: nan"),
        (lambda x: dare_linear(x, 1.0, 2, keys=[1, 2]), r"density: 2"),
        (lambda x: slerp(x, 1.1), r"t: 1.1"),
        (lambda x: slerp(np.vstack([x, x]), 0.5), r"two models, got 4"),
        (lambda x: ties(x, 1.0, elect="loudest"), r"elect: 'loudest'"),
        (lambda x: dare_ties(x, 1.0, normalize="sum", keys=[1, 2]), r"normalize: 'sum'"),
        (lambda x: dare_linear(x, 1.0, 0.5, keys=[1]), r"keys: 1 for 2 models"),
    ],
)
def test_what_cannot_be_done_is_said(call, says):
    with pytest.raises(RecipeError, match=says):
        call(numbers(1, 2, 10))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_an_average_in_steps_rounds_as_code_in_that_dtype_does(dtype: str) -> None:
    held = {"BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    models = torch.randn((3, 1000), generator=torch.Generator().manual_seed(0)).to(held)
    wanted = torch.zeros(1000, dtype=held)
    for model in models:
        wanted += model * (1 / 3)
    wide = models.float()
    from_array = linear(wide.numpy().copy(), [1.0, 1.0, 1.0], stepwise=dtype)
    assert torch.equal(torch.from_numpy(from_array), wanted.float())
    assert torch.equal(linear(wide.clone(), [1.0, 1.0, 1.0], stepwise=dtype), wanted.float())
    assert not torch.equal(linear(wide.clone(), [1.0, 1.0, 1.0]).to(held), wanted)
