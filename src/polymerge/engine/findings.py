"""What a check of an output has found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Finding", "Verification"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `passed` is None where it could not be checked here, and `detail` says why."""

    check: str
    passed: bool | None
    detail: str

    def __str__(self) -> str:
        word = {True: "ok", False: "FAILED", None: "not checked"}[self.passed]
        return f"{self.check:<11} {word}: {self.detail}"


@dataclass(frozen=True)
class Verification:
    """Everything that was looked at in a checkpoint folder."""

    folder: Path
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(finding.passed is not False for finding in self.findings)

    def __str__(self) -> str:
        return "\n".join(f"  {finding}" for finding in self.findings)
