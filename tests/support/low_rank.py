"""Random low-rank updates as factors, and as dense matrices."""

from __future__ import annotations

import numpy as np

from polymerge.methods.lora import Factors


def adapters(seed, out=13, columns=9, ranks=(3, 1, 4)):
    rng = np.random.default_rng(seed)
    return [
        Factors(rng.normal(0, 1, (out, r)).astype(np.float32), rng.normal(0, 1, (r, columns)).astype(np.float32))
        for r in ranks
    ]


def dense(pair):
    return pair.b.astype(np.float64) @ pair.a.astype(np.float64)
