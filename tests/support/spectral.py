"""Deltas as whole matrices, and spectral methods written out in float64 with dense SVDs, as the papers have them."""

from __future__ import annotations

import numpy as np

__all__ = [
    "away",
    "deltas_of",
    "flow",
    "literal_closed",
    "literal_dc_merge",
    "literal_ip_merge",
    "literal_iso_c",
    "literal_iso_cts",
    "literal_optmerge",
    "literal_svc",
    "literal_tsv",
    "participation",
]


def deltas_of(seed, models=3, m=13, n=9, rank=None, dtype=np.float32):
    """Random deltas [models, m, n] with something in common, of this rank each if one is said."""
    draws = np.random.default_rng(seed)
    if rank is None:
        found = draws.standard_normal((models, m, n)) + 0.5 * draws.standard_normal((m, n))
    else:
        found = draws.standard_normal((models, m, rank)) @ draws.standard_normal((models, rank, n))
    return found.astype(dtype)


def away(got, wanted):
    """The distance of two matrices, relative to the norm of the second; the first's norm if that is zero."""
    norm = np.linalg.norm(wanted)
    return float(np.linalg.norm(got - wanted) / norm) if norm else float(np.linalg.norm(got))


def literal_iso_c(deltas):
    """The paper's lines: one SVD of the sum, each singular value its mean."""
    u, s, v = np.linalg.svd(deltas.astype(np.float64).sum(axis=0), full_matrices=False)
    return s.mean() * u @ v


def literal_iso_cts(deltas, fraction):
    """The released lines: the sum's directions, then each model's own, all made orthogonal."""
    deltas = deltas.astype(np.float64)
    models, m, n = deltas.shape
    p = min(m, n)
    common = int(p * fraction)
    own = round((p - common) / models)
    common = p - own * models
    u, s, v = np.linalg.svd(deltas.sum(axis=0), full_matrices=False)
    u, s, v = u[:, :common], s[:common], v[:common]
    lefts, rights, strengths = [], [], []
    for delta in deltas:
        left, values, right = np.linalg.svd(delta - u @ u.T @ delta, full_matrices=False)
        lefts.append(left[:, :own])
        rights.append(right[:own])
        strengths.append(values[:own])
    nearest = []
    for vectors in (np.concatenate([*lefts, u], axis=1), np.concatenate([*rights, v]).T):
        a, _, b = np.linalg.svd(vectors, full_matrices=False)
        nearest.append(a @ b)
    return np.concatenate([*strengths, s]).mean() * nearest[0] @ nearest[1].T


def literal_tsv(deltas, weight, count):
    """The nearest orthonormal matrices are P Q^T of the SVD of U and of V."""
    lefts, values, rights = [], [], []
    for delta, number in zip(deltas, weight, strict=True):
        u, s, v = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
        lefts += list(u.T[:count])
        values += list(number * s[:count])
        rights += list(v[:count])
    nearest = []
    for vectors in (lefts, rights):
        p, _, q = np.linalg.svd(np.array(vectors).T, full_matrices=False)
        nearest.append(p @ q)
    return nearest[0] @ np.diag(values) @ nearest[1].T


def literal_optmerge(deltas, kept):
    """300 steps of gradient descent with momentum, from the mean."""
    deltas = deltas.astype(np.float64)
    x, speed = deltas.mean(axis=0), 0.0
    parts = []
    for delta in deltas:
        u, s, v = np.linalg.svd(delta, full_matrices=False)
        part = (u[:, :kept] * s[:kept]) @ v[:kept]
        parts.append((part, (v[:kept].T * s[:kept] ** 2) @ v[:kept] / np.square(delta).sum()))
    for _ in range(300):
        gradient = sum(2 * (x - part) @ seen for part, seen in parts)
        speed = 0.9 * speed + gradient
        x = x - 1e-4 * speed
    return x


def literal_closed(deltas, init, way):
    """X0 - X0 Q f Q^T + G Q f / l Q^T, with all n eigenvectors."""
    deltas = deltas.astype(np.float64)
    n = deltas.shape[-1]
    squares = [np.square(delta).sum() for delta in deltas]
    c = sum(delta.T @ delta / square for delta, square in zip(deltas, squares, strict=True))
    g = sum(delta @ delta.T @ delta / square for delta, square in zip(deltas, squares, strict=True))
    start = {"sum": deltas.sum(axis=0), "mean": deltas.mean(axis=0), "zero": 0 * deltas[0]}[init]
    found, q = np.linalg.eigh(c)
    found, q = np.maximum(found[::-1], 1e-8), q[:, ::-1]
    f = way(found)
    assert f.shape == (n,)
    return start - (start @ q * f) @ q.T + (g @ q * (f / found)) @ q.T


def flow(found, share):
    return np.where(np.arange(len(found)) < np.ceil(share * len(found)), 1 - np.exp(-300 * found), 0)


def participation(found):
    roots = np.sqrt(found)
    return np.where(np.arange(len(found)) < np.ceil(roots.sum() ** 2 / found.sum()), 1.0, 0.0)


def smoothed(s, smoothing, rho):
    if smoothing == "none":
        return s
    if smoothing == "avg":
        return np.full(len(s), s.mean())
    falling = np.linspace(min(rho, s[0] / s[-1]), 1, len(s))
    return falling / falling.sum() * s.sum()


def literal_dc_merge(deltas, keep, smoothing="none", rho=5.0, kept=None):
    deltas = deltas.astype(np.float64)
    models, p = len(deltas), min(deltas.shape[1:])
    kept = kept or p // models
    parts = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
    common = []
    for vectors in ([u[:, :kept] for u, _, _ in parts], [v[:kept].T for _, _, v in parts]):
        a, _, b = np.linalg.svd(np.concatenate(vectors, axis=1), full_matrices=False)
        common.append(a @ b)
    u, v = common
    cores = []
    for left, s, right in parts:
        core = u.T @ left[:, :kept] @ np.diag(smoothed(s[:kept], smoothing, rho)) @ right[:kept] @ v
        count = max(1, int(keep * p * p))
        least = np.sort(np.abs(core), axis=None)[max(core.size - count, 0)]
        cores.append(np.where(np.abs(core) >= least * (1 - 1e-6), core, 0))
    merged = np.zeros_like(cores[0])
    for i, j in np.ndindex(*merged.shape):
        if i // kept != j // kept:
            continue
        total = sum(core[i, j] for core in cores)
        agree = [core[i, j] for core in cores if core[i, j] * total > 0]
        merged[i, j] = np.mean(agree) if agree else 0
    return u @ merged @ v.T


def literal_ip_merge(deltas, weight, rank, threshold):
    deltas = deltas.astype(np.float64)
    _, s1, v1 = (x[..., :rank] if place < 2 else x[:rank] for place, x in enumerate(np.linalg.svd(deltas[0], False)))
    merged = weight[0] * deltas[0]
    for number, delta in zip(weight[1:], deltas[1:], strict=True):
        u, s, v = np.linalg.svd(delta, full_matrices=False)
        u, s, v = u[:, :rank], s[:rank], v[:rank]
        cosines = [abs(a @ b) for a, b in zip(v1, v, strict=True)]
        if max(cosines) < threshold:
            continue
        w = np.exp(32 * np.array(cosines))
        q = (w / w.sum())[:, None] * v1
        merged = merged + number * s1.sum() / s.sum() * (u * s) @ v @ q.T @ q
    return merged


def literal_svc(merged, deltas, alpha):
    u, s, v = np.linalg.svd(merged.astype(np.float64), full_matrices=False)
    for r in range(len(s)):
        projections = []
        for delta in deltas.astype(np.float64):
            mine, its = u[:, r] @ merged.astype(np.float64), u[:, r] @ delta
            projections.append(max(alpha, mine @ its / (its @ its)))
        s[r] *= len(deltas) / sum(projections)
    return (u * s) @ v
