"""Charts and pictures: the same bits each time, whatever their names hold, and only where altair is there."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from polymerge import charts
from polymerge.charts import Series, bar_chart, draw, figure, heat_map, line_chart
from polymerge.themes import PALETTES, chart_config

HOSTILE = "</text><script>alert(1)</script> 'a' \"b\" [0].c\\"


def lines(name: str = "score") -> Any:
    series = {name: Series([1.0, None, 2.0], [0.5, None, 1.5], [1.5, None, 2.5]), "other": Series([0.0, 1.0, None])}
    return line_chart(f"Of {name}", (name, [0.1, 0.5, 0.2]), name, series, about=name, marks={name: 0.5})


def every_kind(name: str) -> list[Any]:
    return [
        lines(name),
        line_chart("words", ("method", [name, "b"]), "points", {name: Series([1, 2])}),
        heat_map(name, (name, [name, "b"]), ("", [name]), name, [[-1.0, None]], diverging=True),
        heat_map("one", ("layer", [0]), ("module", [name]), name, [[3]]),
        bar_chart(name, (name, [name, "b"]), name, {name: Series([1, None], [0, None], [2, None])}),
        bar_chart(name, ("task", ["a"]), "points", {name: Series([1]), "b": Series([2])}),
    ]


def test_a_picture_has_the_same_bits_each_time(tmp_path: Path) -> None:
    for name in ("one", "other"):
        assert draw(lambda: [lines()], tmp_path / name) == (tmp_path / f"{name}.png", tmp_path / f"{name}.svg")
    for ending in ("png", "svg"):
        assert (tmp_path / f"one.{ending}").read_bytes() == (tmp_path / f"other.{ending}").read_bytes()


def test_names_of_a_run_are_shown_as_they_are(tmp_path: Path) -> None:
    """Vega-Lite writes titles of tooltips into an expression, where a backslash would end it: no name comes there."""
    _, svg = draw(lambda: every_kind(HOSTILE), tmp_path / "hostile")
    texts = {node.text for node in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")}
    assert HOSTILE in texts
    for chart in every_kind(HOSTILE):
        for layer in json.loads(chart.to_json())["layer"]:
            assert "alert" not in json.dumps(layer.get("transform", "")) + json.dumps(layer["mark"])


def test_a_figure_of_the_page_has_its_numbers_and_no_colour_of_its_own() -> None:
    made = figure({"one": lines(), "two": lines("two")})
    assert made["title"] == "Of score"
    assert [view["name"] for view in made["views"]] == ["one", "two"]
    view = made["views"][0]
    rows = view["spec"]["datasets"][view["spec"]["data"]["name"]]
    assert rows[0] == {"x": 0.1, "series": "score", "value": 1.0, "low": 0.5, "high": 1.5}
    assert view["columns"][:2] == [["x", "score"], ["series", "of"]]
    assert view["marks"] == [[0.5, "score"]]
    for palette in PALETTES.values():
        assert not any(colour in json.dumps(made) for colour in palette.values())


def test_what_is_pointed_at_is_the_nearest_value() -> None:
    chart = json.loads(lines().to_json())
    places = chart["datasets"][chart["layer"][-1]["data"]["name"]]
    assert [(one["x"], one["from"], one["to"]) for one in places] == [
        (0.1, 0.1, pytest.approx(0.15)),
        (0.5, pytest.approx(0.35), 0.5),
        (0.2, pytest.approx(0.15), pytest.approx(0.35)),
    ]


def test_a_heat_map_of_signed_values_has_0_in_its_middle() -> None:
    chart = heat_map("t", ("x", [0, 1]), ("y", ["a"]), "v", [[-3.0, 1.0]], diverging=True)
    assert json.loads(chart.to_json())["layer"][0]["encoding"]["color"]["scale"]["domain"] == [-3.0, 3.0]


def test_without_altair_nothing_is_drawn_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(charts, "find_spec", lambda name: None if name == "vl_convert" else name)
    with caplog.at_level(logging.WARNING, logger="polymerge"):
        assert draw(lambda: [lines()], tmp_path / "picture") == ()
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{tmp_path / 'picture.png'} is not drawn: charts need altair and vl-convert-python: "
        "pip install 'polymerge[report]'"
    )
    assert not list(tmp_path.iterdir())


def test_both_themes_configure_the_same() -> None:
    light, dark = chart_config("light"), chart_config("dark")
    assert light.keys() == dark.keys()
    assert light["background"] != dark["background"]


NAN, INF = float("nan"), float("inf")
BROKEN = [NAN, INF, -INF, 1e301, 1e-310, None, 2.0]


@pytest.mark.parametrize("kind", ["lines", "bars", "map", "limits", "signed"])
def test_what_is_not_finite_is_left_out_and_said(kind: str, tmp_path: Path) -> None:
    names = [f"n{place}" for place in range(len(BROKEN))]
    series = {"s": Series(BROKEN, BROKEN, BROKEN)}
    made = {
        "lines": lambda: line_chart("t", ("x", names), "y", series, about="about"),
        "bars": lambda: bar_chart("t", ("x", names), "y", series, about="about"),
        "map": lambda: heat_map("t", ("x", names), ("y", ["r"]), "v", [BROKEN], about="about"),
        "limits": lambda: heat_map("t", ("x", names), ("y", ["r"]), "v", [BROKEN], about="about", limits=(-INF, NAN)),
        "signed": lambda: heat_map("t", ("x", names), ("y", ["r"]), "v", [BROKEN], about="about", diverging=True),
    }[kind]
    spec = made().to_dict()
    (rows,) = (rows for rows in spec["datasets"].values() if len(rows) == len(BROKEN) and "value" in rows[0])
    assert [row["value"] for row in rows] == [None, None, None, None, 0, None, 2.0]
    assert spec["title"]["subtitle"] == ["about; left out, for not being finite: 4"]
    json.dumps(spec, allow_nan=False)
    _, picture = draw(lambda: [made()], tmp_path / "picture")
    drawn = picture.read_text(encoding="utf-8")
    assert "NaN" not in drawn
    assert "Infinity" not in drawn
