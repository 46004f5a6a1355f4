"""Methods whose weights follow from angles: against the formulas on whole tensors, and what has to hold of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from polymerge.errors import RecipeError
from polymerge.methods.directions import arc_weights, karcher, model_stock, multislerp, nuslerp, slerp

Floats = NDArray[np.float64]


def tensors(models: int, n: int = 60, seed: int = 0) -> Floats:
    """Random rows [model, n] that point in similar directions."""
    draws = np.random.default_rng(seed)
    return draws.normal(size=n) + 0.7 * draws.normal(size=(models, n))


def unit(x: Floats) -> Floats:
    return x / np.linalg.norm(x)


def literal_karcher(models: Floats, steps: int = 200) -> Floats:
    """The Karcher mean on the sphere by following the mean of logarithms, vector by vector."""
    units = [unit(model) for model in models]
    mean = unit(np.sum(units, axis=0))
    for _ in range(steps):
        tangent = np.zeros_like(mean)
        for one in units:
            angle = math.acos(min(1.0, float(one @ mean)))
            tangent += (one - (one @ mean) * mean) * (angle / math.sin(angle) if angle > 1e-12 else 1.0) / len(units)
        size = float(np.linalg.norm(tangent))
        if size < 1e-14:
            break
        mean = unit(math.cos(size) * mean + math.sin(size) * tangent / size)
    return mean * float(np.mean([np.linalg.norm(model) for model in models]))


def test_karcher_is_the_point_whose_logarithms_cancel() -> None:
    models = tensors(4)
    found = karcher(models.copy(), max_iter=200, tol=1e-13)
    assert np.allclose(found, literal_karcher(models), rtol=0, atol=1e-10)


def test_karcher_of_two_models_is_the_middle_of_their_arc() -> None:
    models = tensors(2)
    models /= np.linalg.norm(models, axis=1, keepdims=True)
    assert np.allclose(karcher(models.copy()), slerp(models.copy(), 0.5), rtol=0, atol=1e-9)


def test_karcher_leaves_out_what_has_no_direction() -> None:
    models = tensors(3)
    models[1] = 0
    assert np.allclose(karcher(models.copy()), karcher(models[[0, 2]].copy()), rtol=0, atol=1e-12)
    assert not karcher(np.zeros((2, 5))).any()
    assert np.isfinite(karcher(np.stack([models[0], -models[0]]))).all()


@pytest.mark.parametrize("models", [2, 3, 8])
def test_model_stock_follows_from_the_mean_cosine(models: int) -> None:
    deltas = tensors(models)
    units = [unit(delta) for delta in deltas]
    pairs = [units[i] @ units[j] for i in range(models) for j in range(i)]
    cosine = sum(pairs) / len(pairs)
    share = models * cosine / (1 + (models - 1) * cosine)
    assert np.allclose(model_stock(deltas.copy()), share * deltas.mean(axis=0), rtol=1e-12, atol=0)


def test_model_stock_of_equal_deltas_is_that_delta_and_of_orthogonal_ones_nothing() -> None:
    delta = tensors(1)
    assert np.allclose(model_stock(np.repeat(delta, 3, axis=0)), delta[0], rtol=1e-12)
    assert np.allclose(model_stock(np.eye(3)), 0, atol=1e-15)
    assert not model_stock(np.stack([delta[0], -delta[0]])).any()
    with pytest.raises(RecipeError, match="two models or more"):
        model_stock(delta)


def test_by_row_every_row_is_a_tensor_of_its_own() -> None:
    deltas = tensors(3)
    whole = np.concatenate([model_stock(deltas[:, start : start + 12].copy()) for start in range(0, 60, 12)])
    assert np.array_equal(model_stock(deltas.copy(), True, width=12), whole)
    pair = deltas[:2]
    rows = np.concatenate([nuslerp(pair[:, start : start + 12].copy(), [1, 3]) for start in range(0, 60, 12)])
    assert np.array_equal(nuslerp(pair.copy(), [1, 3], False, width=12), rows)


def test_nuslerp_is_slerp_without_a_straight_line() -> None:
    models = tensors(2)
    assert np.array_equal(nuslerp(models.copy(), [0.5, 1.5]), slerp(models.copy(), 0.75))
    close = np.stack([models[0], models[0] + 1e-3 * models[1]])
    one, other = arc_weights(close @ close.T, 0.5, math.inf)
    assert (one, other) != (0.5, 0.5) == arc_weights(close @ close.T, 0.5)
    assert np.array_equal(nuslerp(np.stack([models[0]] * 2), [1, 1]), models[0])


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (nuslerp, ([1, -1],), "weight: -1.0 is not in"),
        (nuslerp, ([0, 0],), "both 0"),
        (nuslerp, ([1, 1], False, True), "between columns"),
        (multislerp, ([1, -1],), "add up to about 0"),
    ],
)
def test_what_makes_no_point_on_the_arc_is_refused(function: Any, arguments: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        function(tensors(2), *arguments)


def test_multislerp_has_the_mean_direction_and_the_mean_norm() -> None:
    models, weight = tensors(3), np.array([0.5, 0.3, 0.4])
    share = weight / weight.sum()
    expected = unit(share @ np.stack([unit(model) for model in models])) * (share @ np.linalg.norm(models, axis=1))
    assert np.allclose(multislerp(models.copy(), list(weight)), expected, rtol=1e-12, atol=1e-12)
    assert not multislerp(np.zeros((3, 4)), list(weight)).any()
    with pytest.raises(RecipeError, match="cancel each other"):
        multislerp(np.stack([models[0], -models[0]]), [1, 1])


@pytest.mark.parametrize("by_row", [False, True])
def test_order_of_models_changes_nothing(by_row: bool) -> None:
    models = tensors(4).astype(np.float32)
    turned = models[::-1].copy()
    width = 12 if by_row else None
    weights = [0.1, 0.2, 0.3, 0.4]
    one, other = model_stock(models.copy(), by_row, width=width), model_stock(turned.copy(), by_row, width=width)
    assert np.allclose(one, other, rtol=1e-6, atol=1e-7)
    assert np.allclose(karcher(models.copy()), karcher(turned.copy()), rtol=1e-6, atol=1e-7)
    assert np.allclose(
        multislerp(models.copy(), weights), multislerp(turned.copy(), weights[::-1]), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("width", [None, 7, 1500])
def test_torch_gives_the_same_bits(width: int | None) -> None:
    models = tensors(3, 4200).astype(np.float32)
    found = model_stock(torch.from_numpy(models.copy()), width is not None, width=width)
    assert np.array_equal(found.numpy(), model_stock(models.copy(), width is not None, width=width))
