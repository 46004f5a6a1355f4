"""The findings of an output check, and the check of its values."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from polymerge.checkpoints import TensorInfo
from polymerge.checkpoints.bounds import RECORDS_BYTES
from polymerge.checkpoints.json_objects import read_json
from polymerge.dtypes import BITS, MERGEABLE
from polymerge.engine.extents import Files
from polymerge.errors import PolymergeError
from polymerge.methods import kernels
from polymerge.tables import Table

__all__ = ["BLOCK", "Finding", "Verification", "finite"]

BLOCK: Final = 1 << 20
"""Elements read at a time."""


@dataclass(frozen=True)
class Finding:
    """The result of one check; `passed` is None if it could not be done here, and `detail` says why."""

    check: str
    passed: bool | None
    detail: str

    def __str__(self) -> str:
        word = {True: "ok", False: "FAILED", None: "not checked"}[self.passed]
        return f"{self.check:<11} {word}: {self.detail}"


@dataclass(frozen=True)
class Verification(Table):
    """All findings about the folder of a checkpoint or an adapter."""

    folder: Path
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(finding.passed is not False for finding in self.findings)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each thing that was looked at."""
        return [asdict(finding) for finding in self.findings]

    def __str__(self) -> str:
        return "\n".join(f"  {finding}" for finding in self.findings)


def finite(entries: Iterable[TensorInfo], folder: Path, checked: Collection[str] = ()) -> Finding:
    """Check that no value is NaN or infinite, reading one block at a time.

    folder   what its polymerge.json counts of infinities that the recipe allows is what there must be
    checked  names of tensors whose values need no second look
    """
    known = _overflow_in(folder)
    bad = []
    values, wide = np.empty(BLOCK, np.float32), np.empty(0, np.float64)
    with Files() as files:
        for entry in entries:
            if entry.dtype not in MERGEABLE or entry.name in checked:
                continue
            if entry.dtype == "F64" and not wide.size:
                wide = np.empty(BLOCK, np.float64)
            out, width = wide if entry.dtype == "F64" else values, BITS[entry.dtype] // 8
            infinite = nan = 0
            for raw in files.blocks(entry, BLOCK * width):
                if not kernels.decode(raw, entry.dtype, out[: raw.size // width]):
                    more = kernels.not_finite(raw, entry.dtype)
                    infinite, nan = infinite + more[0], nan + more[1]
            if nan or infinite != known.get(entry.name, 0):
                bad.append(entry.name)
    if bad:
        return Finding("values", False, f"NaN or infinity in {len(bad)} tensor(s), first {', '.join(bad[:3])}")
    if known:
        counts = f"{sum(known.values())} infinities in {len(known)} tensor(s)"
        return Finding("values", True, f"no NaN, and {counts}, which the recipe allows: first {next(iter(known))}")
    return Finding("values", True, "no NaN, no infinity")


def _overflow_in(folder: Path) -> dict[str, int]:
    """The number of infinities in each tensor, by polymerge.json; empty without one, or where it says nothing."""
    try:
        found = read_json(folder / "polymerge.json", dict[str, Any], most=RECORDS_BYTES)["output"]["overflow"]
        return {str(name): int(count) for name, count in found.items()}
    except (PolymergeError, ValueError, KeyError, TypeError, AttributeError):
        return {}
