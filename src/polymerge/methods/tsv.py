"""TSV-Merge: keep each adapter's largest singular directions and orthogonalise them across adapters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from polymerge.methods.decompositions import (
    Matrix,
    components,
    gram_of_columns,
    inverse_root,
    joined,
    multiply,
    orthogonal,
    tall,
)
from polymerge.methods.lora import Decomposition, Factors, Wide, check_rank, check_shapes, decompose, narrow
from polymerge.methods.weights import PerModel, per_model

__all__ = ["tsv", "tsv_of_deltas"]


def tsv(pairs: Sequence[Factors], weight: PerModel = 1.0, share: float | None = None, *, rank: int) -> Factors:
    """Sum the largest singular directions of each adapter, orthogonalised across the adapters.

    Gargiulo et al. 2025, arXiv:2412.00081 (CVPR 2025), TSV-Merge: of T updates U_i S_i V_i^T each keeps its largest
    components, an equal share; side by side they form U, S and V; U and V are replaced by the nearest matrices with
    orthonormal columns (Procrustes: P Q^T for U = P D Q^T), and U_perp S V_perp^T is the merged update. Everything is
    computed from the factors. Where this differs: the paper has no weights, here they multiply the singular values; the
    share is `rank // T` components of the wanted rank, not of the full one. Singular values
    of zero and models of weight zero take no part, and where U or V is not of full rank, as with equal adapters, what
    it lacks stays zero, where the paper's P Q^T has arbitrary vectors: equal adapters then give one adapter's part
    times the mean of the weights.

    pairs    [model]  updates of one shape [out, in], of any ranks
    weight   [model]  each model's coefficient, of either sign; it does not change the directions
    share    of the wanted rank, which every model keeps, one component at least; default: 1 / T
    rank     at least 1
    returns  factors of as many components as all models keep; for one model of weight 1 its update
    raises   RecipeError where shapes differ, `weight` is not one number per model, or `rank` is below 1
    """
    check_rank(rank)
    check_shapes(pairs)
    weights = per_model(weight, len(pairs), "weight")
    most = max(1, rank // len(pairs) if share is None else int(share * rank))
    lefts, values, rights = [], [], []
    for pair, number in zip(pairs, weights, strict=True):
        parts = decompose(pair)
        count = min(most, parts.determined) if number else 0
        lefts.append(parts.u[:, :count])
        values.append(number * parts.s[:count])
        rights.append(parts.v[:count].T)
    left, right = np.concatenate(lefts, axis=1), np.concatenate(rights, axis=1)
    if not left.shape[1]:
        return Factors(np.zeros((len(left), 1), np.float32), np.zeros((1, len(right)), np.float32))
    s = np.concatenate(values)
    roots = np.sqrt(np.abs(s))
    return Factors(narrow(_orthonormal(left) * (np.sign(s) * roots)), narrow((_orthonormal(right) * roots).T))


def tsv_of_deltas(deltas: Matrix, weight: PerModel = 1.0, share: float | None = None) -> Matrix:
    """Sum the largest singular directions of each delta, orthogonalised across the models.

    Gargiulo et al. 2025, arXiv:2412.00081 (CVPR 2025), TSV-Merge: of T deltas U_i S_i V_i^T each keeps its largest
    components, an equal share; side by side they form U, S and V; U and V are replaced by the nearest matrices with
    orthonormal columns, and U_perp S V_perp^T is the merged delta. Where this differs: the paper has no weights, here
    they multiply the singular values. Singular values of zero and models of weight zero take no part, and where U or V
    is not of full rank, as with equal models, what it lacks stays zero, where the paper has arbitrary vectors: equal
    models then give one model's part times the mean of the weights.

    deltas   [model, m, n]  float32 or float64, finite; overwritten
    weight   [model]        each model's coefficient, of either sign; it does not change the directions
    share    of the min(m, n) components that each model keeps, `int(share * min(m, n))`; default: 1 / T
    returns  [m, n]         the merged delta, in the memory of the first one; for one model of weight 1 its delta
    raises   RecipeError where `weight` is not one number per model
    """
    weights = per_model(weight, len(deltas), "weight")
    stack = tall(deltas)
    size = stack.shape[-1]
    most = size // len(deltas) if share is None else int(share * size)
    lefts, rights, values = [], list[Wide](), []
    for matrix, number in zip(stack, weights, strict=True):
        found = components(matrix, most if number else 0)
        lefts.append(matrix[:, : len(found.s)])
        multiply([matrix], found.to_left, lefts[-1])
        rights.append(found.v)
        values.append(number * found.s)
        del found
    right = orthogonal(rights)
    left = inverse_root(gram_of_columns(lefts))
    left *= joined(values)
    multiply(lefts, left @ right.T, stack[0])
    merged: Matrix = deltas[0]
    return merged


def _orthonormal(x: Wide) -> Wide:
    """The nearest matrix [m, n] with orthonormal columns, within the column space of `x`."""
    q, r = np.linalg.qr(x)
    parts = Decomposition(*np.linalg.svd(r, full_matrices=False))
    count = parts.determined
    nearest: Wide = q @ (parts.u[:, :count] @ parts.v[:count])
    return nearest
