"""What an interpreter has loaded after some code."""

from __future__ import annotations

import subprocess
import sys


def loaded_by(code: str) -> set[str]:
    """The packages that are loaded after some code has run in a fresh interpreter."""
    report = "import sys; sys.stderr.write(' '.join({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, timeout=60, check=True
    )
    return set(done.stderr.split())
