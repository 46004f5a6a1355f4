"""The page: one HTML file that holds its style, its script and its data, and asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Final

__all__ = ["GENERATOR", "embedded", "make_page"]

GENERATOR: Final = '<meta name="generator" content="polymerge report">'
"""What every page that was made here holds."""

_SCRIPTS = (
    "elements.js", "table.js", "chart.js", "lines.js", "heat.js", "bars.js", "sections.js", "measured.js", "layers.js",
    "script.js",
)  # fmt: skip


def make_page(data: Mapping[str, Any]) -> str:
    """The page that shows a report's data."""
    script = "\n".join(['"use strict";', "(() => {", *(_static(name) for name in _SCRIPTS), "})();"])
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "title": html.escape(str(data["title"])),
        "digest": f"sha256-{digest}",
        "style": _static("style.css"),
        "script": script,
        "data": embedded(data),
    }
    # one pass, so that what was put in is not looked through for more
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _static("template.html"))


def embedded(data: Mapping[str, Any]) -> str:
    """JSON that can stand inside a script element whatever its texts hold."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _static(name: str) -> str:
    return (files("polymerge.reporting") / "static" / name).read_text(encoding="utf-8")
