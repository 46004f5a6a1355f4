"""TIES: trim, elect sign, merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from polymerge.errors import RecipeError
from polymerge.methods.kernels import AnyBlock, elected_sum, find_cutoffs, keep_largest
from polymerge.methods.weights import PerModel, per_model, shares

__all__ = ["Elect", "Normalize", "check_words", "kept", "ties"]

Elect = Literal["weighted", "unweighted"]
Normalize = Literal["weight", "count", "none"]


def check_words(elect: str, normalize: str) -> None:
    """Raise RecipeError if `elect` or `normalize` is unknown."""
    for name, word, known in (("elect", elect, get_args(Elect)), ("normalize", normalize, get_args(Normalize))):
        if word not in known:
            raise RecipeError(f"{name}: '{word}' is not one of {', '.join(known)}")


def kept(density: PerModel, models: int, n: int) -> list[int]:
    """The minimum number of entries that each model keeps of `n`: `int(density * n)`, in float64.

    At least one (0.001 of 100), as in mergekit; none at a density of 0.
    """
    return [max(int(share * n), 1 if share > 0 else 0) for share in per_model(density, models, "density", 0.0, 1.0)]


def ties(
    deltas: AnyBlock,
    weight: PerModel,
    density: PerModel = 1.0,
    elect: Elect = "weighted",
    normalize: Normalize = "weight",
    *,
    cutoff: Sequence[float] | None = None,
) -> AnyBlock:
    """Trim each delta to its largest entries, elect a sign per entry, and average the agreeing entries.

    Yadav et al. 2023, arXiv:2306.01708, section 3 and algorithm 1. The paper has no weights: it elects on the plain sum
    (`elect="unweighted"`) and takes the mean of the agreeing entries (`normalize="count"`), as does Bring Reason to
    Vision, with weighted deltas in the sum. The defaults are those of mergekit: weights take part in the
    election and divide the sum. Where the paper leaves a choice: every entry is kept whose magnitude reaches that of
    the `int(density * n)`-th largest (the largest if that is the 0-th), so ties at the threshold are all kept, wherever
    they are; a vote of zero elects plus; a zero entry agrees with neither sign.

    With `elect="weighted"` a model agrees if weight * delta has the elected sign, so a negative weight votes for the
    opposite of its delta; with "unweighted" the delta's own sign counts and the weight only affects the sum. A sum of
    agreeing weights below 1e-8 in magnitude is not divided by.

    deltas     [model, n]  task vectors, float32 or float64; overwritten by the trimmed ones
    weight     [model]     each model's coefficient, of either sign
    density    [model]     share of entries kept, in [0, 1]; one number stands for all models
    elect      weighted: by the sum of weight * delta; unweighted: by the sum of deltas
    normalize  divide by the agreeing weights, by the count of those who agree, or by nothing
    cutoff     [model]     the smallest kept magnitude, if `deltas` is a block of a larger tensor;
                           `density` then has no effect
    returns    [n]         the merged delta
    raises     RecipeError where `weight` or `density` is not one number per model, a density is out of range, or
               `elect` or `normalize` is another word
    """
    check_words(elect, normalize)
    models, n = deltas.shape
    weights = shares(weight, models, normalize=False)
    if cutoff is None:
        cutoff = find_cutoffs(deltas, kept(density, models, n))
    return elected_sum(keep_largest(deltas, cutoff), weights, elect, normalize)
