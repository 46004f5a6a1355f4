"""The colours of pages and pictures can be told from each other, by the contrasts that WCAG 2 asks for (level AA)."""

from __future__ import annotations

import pytest

from polymerge.themes import PALETTES


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def of(colours: dict[str, str], pair: tuple[str, str]) -> float:
    return contrast(colours[pair[0]], colours[pair[1]])


def test_contrast_is_that_of_the_definition() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", list(PALETTES))
def test_text_is_read_at_4_5(theme: str) -> None:
    colours = PALETTES[theme]
    pairs = [(ink, ground) for ink in ("ink", "soft", "accent", "good") for ground in ("paper", "panel")]
    pairs += [("tip-ink", "tip"), ("heat-on-low", "heat-low"), ("heat-on-high", "heat-high")]
    pairs += [("heat-on-high", "heat-negative")]
    assert {pair: of(colours, pair) for pair in pairs if of(colours, pair) < 4.5} == {}


@pytest.mark.parametrize("theme", list(PALETTES))
def test_lines_and_edges_of_controls_are_seen_at_3(theme: str) -> None:
    colours = PALETTES[theme]
    names = ["control", *(f"series-{place}" for place in range(1, 7))]
    pairs = [(name, ground) for name in names for ground in ("paper", "panel")]
    assert {pair: of(colours, pair) for pair in pairs if of(colours, pair) < 3} == {}
