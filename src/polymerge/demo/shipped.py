"""Where the demo's three small models lie: in the repository, and not in the package that pip installs."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from polymerge.errors import CheckpointError

__all__ = ["shipped_models"]

_NAMES: Final = ("base", "reason", "vlm")
_INSIDE: Final = Path("src", "polymerge", "demo", "checkpoints")


def shipped_models() -> Path:
    """The folder of the demo's models, with `base`, `reason` and `vlm` in it.

    They are found beside this file, as in a clone that is installed in place, and in the clone that is the working
    folder or lies above it.

    raises CheckpointError where they are in neither.
    """
    here = Path.cwd()
    places = [Path(__file__).parent / "checkpoints", *(folder / _INSIDE for folder in (here, *here.parents))]
    for place in places:
        if all((place / name / "config.json").is_file() for name in _NAMES):
            return place
    raise CheckpointError(
        "the demo's three small models are not in the installed package, to keep it small. They are in the repository: "
        "clone it and run `make demo` there. Or `train=True` has the demo train them anew, in 10 to 20 minutes"
    )
