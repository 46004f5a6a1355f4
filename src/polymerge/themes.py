"""The two themes of pages and pictures: colours by purpose, and the Vega-Lite configuration."""

from __future__ import annotations

from typing import Any, Final

__all__ = ["PALETTES", "chart_config"]

PALETTES: Final = {
    "light": {
        "paper": "#fcfcfa", "panel": "#f4f4f0", "ink": "#1c1f24", "soft": "#585e68", "line": "#dfdfd8",
        "strong-line": "#b9b9b0", "control": "#808076", "accent": "#1d5a9e", "accent-ink": "#ffffff", "good": "#1f6b41",
        "series-1": "#1d5a9e", "series-2": "#b04e12", "series-3": "#2a7350", "series-4": "#7b4aa0",
        "series-5": "#8a6d00", "series-6": "#55606e", "heat-low": "#eef1f4", "heat-high": "#174d8c",
        "heat-negative": "#a84a14", "heat-on-low": "#1c1f24", "heat-on-high": "#ffffff", "tip": "#1c1f24",
        "tip-ink": "#fcfcfa",
    },
    "dark": {
        "paper": "#15171b", "panel": "#1d2025", "ink": "#e7e7e2", "soft": "#a3a9b3", "line": "#30343b",
        "strong-line": "#565c66", "control": "#868d98", "accent": "#86b8ee", "accent-ink": "#10141a", "good": "#7fcb9e",
        "series-1": "#86b8ee", "series-2": "#efa068", "series-3": "#7fcb9e", "series-4": "#c7a3e6",
        "series-5": "#d9c05a", "series-6": "#a9b3c0", "heat-low": "#23272e", "heat-high": "#8fc0f5",
        "heat-negative": "#f0a56f", "heat-on-low": "#e7e7e2", "heat-on-high": "#10141a", "tip": "#e7e7e2",
        "tip-ink": "#15171b",
    },
}  # fmt: skip
"""The colours of both themes, by purpose."""

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'Liberation Sans', Arial, sans-serif"


def chart_config(theme: str) -> dict[str, Any]:
    """The Vega-Lite configuration of a theme, `light` or `dark`."""
    colour = PALETTES[theme]
    series = [colour[f"series-{place}"] for place in range(1, 7)]
    heat = [colour["heat-low"], colour["heat-high"]]
    axis = {
        "labelColor": colour["soft"], "titleColor": colour["soft"], "gridColor": colour["line"],
        "domainColor": colour["strong-line"], "tickColor": colour["strong-line"], "labelFontSize": 12,
        "titleFontSize": 12, "titleFontWeight": "normal", "titlePadding": 8,
    }  # fmt: skip
    return {
        "aria": False,  # the page has a table of each chart's numbers
        "background": colour["paper"],
        "font": _FONT,
        "view": {"stroke": None},
        "axis": axis,
        "legend": {
            "labelColor": colour["soft"], "titleColor": colour["soft"], "labelFontSize": 12, "titleFontSize": 12,
            "titleFontWeight": "normal", "orient": "top", "symbolStrokeWidth": 2.25, "labelLimit": 240, "columns": 2,
        },
        "title": {"color": colour["ink"], "subtitleColor": colour["soft"], "anchor": "start", "frame": "group"},
        "mark": {"color": series[0]},
        "range": {
            "category": series, "symbol": ["circle"], "heatmap": heat, "ramp": heat,
            "diverging": [colour["heat-negative"], colour["heat-low"], colour["heat-high"]],
        },
        "line": {"strokeWidth": 2.25},
        "style": {
            "zero": {"color": colour["strong-line"]},
            "whisker": {"color": colour["ink"], "strokeWidth": 1.25},
            "mark": {"color": colour["soft"], "strokeDash": [2, 3]},
            "mark-label": {"color": colour["ink"], "align": "left", "dx": 4},
            "cell-low": {"color": colour["heat-on-low"]},
            "cell-high": {"color": colour["heat-on-high"]},
        },
    }  # fmt: skip
