"""A method on whole matrices of the tests' own, and its row: the sum of the deltas, all of whose singular values are
made equal to the largest one's half. It cannot be had from parts of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from polymerge.methods import table
from polymerge.methods.method import Method, Parameter

ROW = Method(
    "levelled",
    "all directions of the sum made equally strong",
    "nowhere",
    on="matrices",
    function=f"{__name__}:levelled",
    parameters=(Parameter("weight", "number", 1.0, each=True), Parameter("share", "number", 0.5), table.SCALE),
    adds_ranks=True,
    decomposes=(0, 1),
)


CALLED: list[Callable[[tuple[int, ...]], None]] = []
"""Called with the shape of the deltas at the beginning of each call of `levelled`."""


def levelled(deltas: Any, weight: Sequence[float], share: float = 0.5) -> Any:
    """Weighted sum U S V^T of `deltas` [model, m, n] -> share * max(S) U V^T, of the directions that it has."""
    for function in CALLED:
        function(tuple(deltas.shape))
    total = sum(float(number) * np.asarray(delta, np.float64) for number, delta in zip(weight, deltas, strict=True))
    u, s, v = np.linalg.svd(total, full_matrices=False)
    count = int(np.count_nonzero(s > s[0] * 1e-6))
    deltas[:] = 7.0  # it may change them
    return (share * s[0] * (u[:, :count] @ v[:count])).astype(deltas.dtype)


@contextmanager
def known(*rows: Method) -> Iterator[None]:
    """Have these rows in the table of methods."""
    before = dict(table._TABLE)
    table._TABLE.update({row.name: row for row in rows})
    try:
        yield
    finally:
        table._TABLE.clear()
        table._TABLE.update(before)
