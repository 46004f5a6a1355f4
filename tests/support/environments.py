"""The environments of other programs that tests/clients/make_environments.py makes; tests that need one ask here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def folder() -> Path | None:
    """The folder that POLYMERGE_CLIENTS names."""
    named = os.environ.get("POLYMERGE_CLIENTS")
    return Path(named) if named else None


def environment(name: str) -> pytest.MarkDecorator:
    """The mark of tests that need an environment: they are skipped where there is none."""
    made = folder()
    return pytest.mark.skipif(
        made is None or not (made / name).is_dir(), reason=f"POLYMERGE_CLIENTS names no folder with {name}"
    )
