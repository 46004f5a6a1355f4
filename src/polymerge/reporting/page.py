"""The page: one HTML file with its own style, scripts and data, which makes no network requests."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Final

from polymerge.charts import vega_lite_version
from polymerge.themes import PALETTES, chart_config

__all__ = ["GENERATOR", "embedded", "make_page", "vega"]

GENERATOR: Final = '<meta name="generator" content="polymerge report">'
"""Marks generated pages, so that they may be overwritten."""

_SCRIPTS = ("elements.js", "table.js", "chart.js", "sections.js", "script.js")


def make_page(data: Mapping[str, Any]) -> str:
    """Render the HTML page for the data of a report."""
    own = "\n".join(['"use strict";', "(() => {", *(_static(name) for name in _SCRIPTS), "})();"])
    scripts = [vega(), own]
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    parts = {
        "title": html.escape(str(data["title"])),
        "digests": " ".join(f"'sha256-{digest}'" for digest in digests),
        "colours": _colours(),
        "style": _static("style.css"),
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
        "data": embedded({**data, "themes": {theme: chart_config(theme) for theme in PALETTES}}),
    }
    # in one pass, so that inserted text is never searched for placeholders
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _static("template.html"))


def embedded(data: Mapping[str, Any]) -> str:
    """JSON that is safe inside a script element, whatever its strings contain."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@cache
def vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script without dependencies, about 0.9 MB."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=vega_lite_version())


def _colours() -> str:
    """Both palettes as CSS variables: light by default and on paper, dark if the system or the reader asks for it."""
    light, dark = (
        " ".join([*(f"--{name}: {colour};" for name, colour in palette.items()), f"color-scheme: {theme};"])
        for theme, palette in PALETTES.items()
    )
    system = f'@media screen and (prefers-color-scheme: dark) {{ :root:not([data-theme="light"]) {{ {dark} }} }}'
    asked = f'@media screen {{ :root[data-theme="dark"] {{ {dark} }} }}'
    return f":root {{ {light} }}\n{system}\n{asked}"


def _static(name: str) -> str:
    return (files("polymerge.reporting") / "static" / name).read_text(encoding="utf-8")
