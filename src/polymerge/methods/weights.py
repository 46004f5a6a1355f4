"""The models' weights: one number per model, normalised if a method requires it."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

from polymerge.errors import RecipeError

__all__ = ["PerModel", "cancel", "per_model", "shares"]

PerModel = float | Sequence[float]
"""One number for every model, or one number per model."""


def per_model(
    value: PerModel, models: int, name: str, low: float = float("-inf"), high: float = float("inf")
) -> list[float]:
    """One number per model, in [low, high]; raises RecipeError for a wrong count or a number out of range."""
    numbers = [float(value)] * models if isinstance(value, int | float) else [float(number) for number in value]
    if len(numbers) != models:
        raise RecipeError(f"{name}: {len(numbers)} values for {models} models. Give one per model")
    for number in numbers:
        if not low <= number <= high:
            raise RecipeError(f"{name}: {number} is not in [{low:g}, {high:g}]")
    return numbers


def cancel(weights: Sequence[float]) -> bool:
    """Return whether the sum of the weights is too small to divide by: below 1e-8 in magnitude, mergekit's bound."""
    return abs(fsum(weights)) < 1e-8


def shares(weight: PerModel, models: int, normalize: bool) -> list[float]:
    """One weight per model, in float64; if `normalize`, divided by their sum.

    The sum is exact (rounded once), so the order of models does not matter. Raises RecipeError if the sum is
    too small to divide by.
    """
    weights = per_model(weight, models, "weight")
    if not normalize:
        return weights
    if cancel(weights):
        raise RecipeError(f"weight: {weights} add up to about 0 and cannot be normalised. Set normalize: false")
    total = fsum(weights)
    return [weight / total for weight in weights]
