"""Configs that name another class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def says(folder: Path, **changes: Any) -> Path:
    """Change a checkpoint's config.json; None takes a key out."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")
    return folder
