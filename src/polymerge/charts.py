"""Charts as Vega-Lite specifications, made with altair, for the page and for picture files.

No chart names a colour: colours come from the configuration of the theme that it is drawn with. Names that come from a
run appear in data and titles only, never in field names or expressions.
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymerge.durable import write_file
from polymerge.errors import MissingExtraError, RecipeError
from polymerge.themes import chart_config

if TYPE_CHECKING:
    import altair as alt

__all__ = [
    "Series",
    "bar_chart",
    "draw",
    "figure",
    "heat_map",
    "line_chart",
    "need_charts",
    "stacked",
    "vega_lite_version",
]

log = logging.getLogger("polymerge")

_DASHES = [[1, 0], [7, 3], [2, 3], [9, 3, 2, 3], [4, 2], [1, 2]]
_WIDTH = 560  # of a picture, in pixels
_WRAPPED = 80  # letters of a subtitle's line
_LONG = 8  # letters of a name on the x axis that still stand level, and columns that need no row of their own
_MANY = 50  # values on an axis, from which on dots are small
_FEW = 12  # numbers on an axis that are all written
_KNOWN, _BANDED = "isValid(datum.value)", "isValid(datum.low) && isValid(datum.high)"
_LARGEST = 1e300
_NUMBERED = 12  # columns of a heat map that leave room for a number in each cell


def need_charts() -> None:
    """Check that charts can be made.

    raises MissingExtraError without altair or vl-convert.
    """
    if find_spec("altair") is None or find_spec("vl_convert") is None:
        raise MissingExtraError("charts need altair and vl-convert-python: pip install 'polymerge[report]'")


@dataclass(frozen=True)
class Series:
    """A series of numbers.

    values     one for each x, None if missing
    low, high  the ends of an interval around each value
    """

    values: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None

    @property
    def banded(self) -> bool:
        """Whether any value has an interval."""
        return self.low is not None and any(_drawn(value) is not None for value in self.low)


def line_chart(
    title: str,
    x: tuple[str, Sequence[Any]],
    y: str,
    series: Mapping[str, Series],
    *,
    about: str = "",
    marks: Mapping[str, Any] | None = None,
    zero: bool = True,
    loose: Collection[str] = (),
) -> alt.LayerChart:
    """Curves over numbers or names, with a band if a series has intervals.

    x       title and values of the x axis: numbers, or names in order
    y       title of the y axis
    series  by name
    marks   values of x to mark, by label
    zero    whether the y axis includes 0
    loose   series whose dots are not joined
    """
    import altair as alt

    rows = _rows(x[1], series)
    about = _said(about, [value for one in series.values() for value in one.values])
    axis = alt.Axis(grid=False, labelOverlap=True, labelLimit=130, labelAngle=0)
    across: Any = alt.X("x:O", title=x[0], sort=None, axis=axis)
    near: dict[str, Any] = {"x": across}
    places = [{"x": at} for at in dict.fromkeys(x[1])]
    if len(places) > 1 and all(isinstance(value, int | float) for value in x[1]):
        if len(places) <= _FEW:
            axis.values, axis.format = [place["x"] for place in places], ".6~g"
        elif all(isinstance(value, int) for value in x[1]):
            axis.tickMinStep = 1
        across = alt.X("x:Q", title=x[0], axis=axis, scale=alt.Scale(zero=False, nice=False, padding=12))
        near = {"x": alt.X("from:Q"), "x2": alt.X2("to:Q")}
        places = [place | reach for place, reach in zip(places, _reaches([one["x"] for one in places]), strict=True)]
    colour = {"color": _by_name(series, alt.Color, "stroke")} if len(series) > 1 else {}
    dash = {"strokeDash": _by_name(series, alt.StrokeDash, "stroke")} if len(series) > 1 else {}
    base = alt.Chart().encode(x=across, **colour)
    value = alt.Y("value:Q", title=y, scale=alt.Scale(zero=zero))
    dot = base.mark_point(filled=True, opacity=1, size=8 if len(places) > _MANY else 40)
    joined = [name for name in series if name not in loose]
    line = base
    if loose:  # whose places have no value of the others
        line = base.transform_filter(alt.FieldOneOfPredicate(field="series", oneOf=joined)).transform_filter(_KNOWN)
    layers = [line.mark_line().encode(y=value, **dash), dot.transform_filter(_KNOWN).encode(y=value)]
    if any(one.banded for one in series.values()):
        band = base.mark_area(opacity=0.14).transform_filter(_BANDED)
        layers.insert(0, band.encode(y=alt.Y("low:Q", title=y), y2=alt.Y2("high:Q")))
    for place, (text, at) in enumerate((marks or {}).items()):
        mark = alt.Chart(alt.InlineData([{"x": at, "label": text}])).encode(x=across)
        label = mark.mark_text(style="mark-label").encode(y=alt.value(6 + 14 * place), text="label:N")
        layers += [mark.mark_rule(style="mark"), label]
    # invisible, from top to bottom: the pointer selects the nearest x at any height
    layers.append(alt.Chart(alt.InlineData(places)).mark_rect(opacity=0, tooltip=_told()).encode(**near))
    meta = _meta(x[0], y, series) | {"marks": [[at, text] for text, at in (marks or {}).items()]}
    return _finished(layers, rows, title, about, meta).properties(height=220)


def heat_map(
    title: str,
    x: tuple[str, Sequence[Any]],
    y: tuple[str, Sequence[Any]],
    name: str,
    values: Sequence[Sequence[float | None]],
    *,
    about: str = "",
    limits: tuple[float, float] | None = None,
    diverging: bool = False,
) -> alt.LayerChart:
    """A heat map: a row for each y, a column for each x.

    name       title of the values
    values     rows of columns, None where a value is missing
    limits     domain of the colour scale; by default the minimum and maximum of the values
    diverging  whether 0 is the neutral middle of the scale
    """
    import altair as alt

    about = _said(about, [value for line in values for value in line])
    rows = [
        {"y": row, "x": column, "value": _drawn(value)}
        for row, line in zip(y[1], values, strict=True)
        for column, value in zip(x[1], line, strict=True)
    ]
    there = [row["value"] for row in rows if row["value"] is not None]
    if limits is None or any(_drawn(limit) is None for limit in limits):
        limits = (min(there), max(there)) if there else (0.0, 0.0)
    low, high = limits
    if diverging:
        high = max(abs(low), abs(high)) or 1.0
        low = -high
    long = max((len(str(value)) for value in x[1]), default=0) > _LONG
    quiet: dict[str, Any] = {"ticks": False, "domain": False}
    across = alt.X(
        "x:O", title=x[0], sort=None, scale=alt.Scale(domain=list(x[1])),
        axis=alt.Axis(labelAngle=-40 if long else 0, labelOverlap=not long, labelLimit=130, **quiet),
    )  # fmt: skip
    down = alt.Y("y:O", title=y[0] or None, sort=None, scale=alt.Scale(domain=list(y[1])), axis=alt.Axis(**quiet))
    scale = alt.Scale(domain=[low, high], range="diverging" if diverging else "heatmap", interpolate="lab")
    colour = alt.Color("value:Q", title=name, scale=scale, legend=alt.Legend(gradientLength=140))
    base = alt.Chart().transform_filter(_KNOWN).encode(x=across, y=down)
    layers: list[Any] = [base.mark_rect(tooltip=_told()).encode(color=colour)]
    if len(x[1]) <= _NUMBERED:
        strong = f"abs(datum.value) > {high / 2!r}" if diverging else f"datum.value > {(low + high) / 2!r}"
        number = alt.Text("value:Q", format=".0f" if max(map(abs, there), default=0) >= 100 else ".2~g")
        for style, which in (("cell-low", f"!({strong})"), ("cell-high", strong)):
            layers.append(base.transform_filter(which).mark_text(style=style).encode(text=number))
    meta = {
        "keys": ["y", "x"],
        "columns": [["y", y[0] or "of"], ["x", x[0]], ["value", name]],
        "wide": len(x[1]) > _LONG,
    }
    return _finished(layers, rows, title, about, meta).properties(height=30 * len(y[1]))


def bar_chart(
    title: str, labels: tuple[str, Sequence[str]], value: str, series: Mapping[str, Series], *, about: str = ""
) -> alt.LayerChart:
    """Horizontal bars, grouped by label, with intervals if a series has them.

    labels  title and values of the y axis
    value   title of the x axis
    """
    import altair as alt

    about = _said(about, [value for one in series.values() for value in one.values])
    room = alt.Scale(domain=list(labels[1]), paddingInner=0.25, paddingOuter=0.1)
    across = alt.Y("x:O", title=None, sort=None, scale=room, axis=alt.Axis(ticks=False, domain=False))
    names = alt.Scale(domain=list(series))
    base = alt.Chart().encode(y=across)
    bar = base.transform_filter(_KNOWN)
    if len(series) > 1:
        bar = bar.encode(yOffset=alt.YOffset("series:N", sort=None, scale=names))
    colour = {"color": _by_name(series, alt.Color, "square")} if len(series) > 1 else {}
    layers = [bar.mark_bar(opacity=0.85).encode(x=alt.X("value:Q", title=value, axis=alt.Axis(tickCount=8)), **colour)]
    if any(one.banded for one in series.values()):
        whisker = bar.transform_filter(_BANDED).mark_rule(style="whisker")
        layers.append(whisker.encode(x=alt.X("low:Q", title=value), x2=alt.X2("high:Q")))
    places = alt.InlineData([{"x": label} for label in labels[1]])
    layers.append(alt.Chart(places).mark_rect(opacity=0, tooltip=_told()).encode(y=across))
    meta = _meta(labels[0], value, series) | {"wide": True}
    height = (16 * len(series) + 10) * len(labels[1])
    return _finished(layers, _rows(labels[1], series), title, about, meta).properties(height=height)


def draw(make: Callable[[], Sequence[alt.LayerChart]], stem: Path) -> tuple[Path, ...]:
    """Write charts, stacked, as STEM.png and STEM.svg; returns the files.

    Without altair or vl-convert, a log line reports it and nothing is drawn: the numbers behind a picture are
    worth more than the picture.
    """
    files = stem.with_suffix(".png"), stem.with_suffix(".svg")
    try:
        need_charts()
    except MissingExtraError as error:
        log.warning("%s is not drawn: %s", files[0], error)
        return ()
    import vl_convert

    charts = make()
    if not charts:
        return ()
    spec = stacked(charts).to_dict(validate=False)
    given: dict[str, Any] = {"vl_version": vega_lite_version(), "allowed_base_urls": []}
    write_file(files[0], vl_convert.vegalite_to_png(spec, scale=2, **given))
    write_file(files[1], vl_convert.vegalite_to_svg(spec, **given))
    return files


def stacked(charts: Sequence[alt.LayerChart], theme: str = "light") -> alt.VConcatChart:
    """Charts below each other as one of altair's, in a theme: a notebook shows it, and `save` writes it to a file.

    raises MissingExtraError without altair or vl-convert, RecipeError if there are none.
    """
    need_charts()
    if not charts:
        raise RecipeError("there is nothing to draw: no chart shows a result of this kind")
    import altair as alt

    views = []
    for chart in charts:
        view = chart.properties(width=_WIDTH)
        view.usermeta = alt.Undefined  # stands at the top of a specification only
        views.append(view)
    apart = alt.ScaleResolveMap(color="independent", strokeDash="independent")
    return alt.VConcatChart(
        vconcat=views, spacing=28, resolve=alt.Resolve(scale=apart), config=alt.Config(**chart_config(theme))
    )


def figure(charts: Mapping[str, alt.LayerChart]) -> dict[str, Any]:
    """A figure for the page: charts with one title, among which the reader chooses by name.

    Each view holds the specification, which fits the width of its container, the titles of its columns, and the
    subtitle, which the page writes itself.
    """
    views = []
    # the parts were validated as they were made
    made = {name: chart.to_dict(validate=False) for name, chart in charts.items()}
    for name, spec in made.items():
        drawn = {key: spec[key] for key in ("$schema", "data", "datasets", "height", "layer")}
        about = " ".join(spec["title"]["subtitle"])
        meta = {"marks": [], **spec["usermeta"]}
        fit = {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
        views.append({"name": name, "about": about, **meta, "spec": drawn | fit})
    first = next(iter(made.values()))
    return {"title": first["title"]["text"], "wide": first["usermeta"]["wide"], "views": views}


def vega_lite_version() -> str:
    """The version of Vega-Lite that altair writes for, as vl-convert names it: `6.4`."""
    import altair as alt

    return ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])


def _rows(x: Sequence[Any], series: Mapping[str, Series]) -> list[dict[str, Any]]:
    """One row per series and x, with fixed field names."""
    return [
        {"x": at, "series": name, "value": _drawn(one.values[place])}
        | ({"low": _drawn((one.low or ())[place]), "high": _drawn((one.high or ())[place])} if one.banded else {})
        for name, one in series.items()
        for place, at in enumerate(x)
    ]


def _drawn(value: float | None) -> float | None:
    """A value; 0 for one on which scales break, it is so small; None for NaN, infinity and what is as good as that."""
    if value is None or not -_LARGEST <= value <= _LARGEST:
        return None
    return value if abs(value) * _LARGEST >= 1 else 0


def _said(about: str, values: Sequence[float | None]) -> str:
    """The subtitle, with the number of values that are left out because they cannot be drawn."""
    left = sum(value is not None and _drawn(value) is None for value in values)
    return "; ".join(filter(None, [about, f"left out, for not being finite: {left}" if left else ""]))


def _meta(x: str, value: str, series: Mapping[str, Series]) -> dict[str, Any]:
    """What the page needs for tooltips and tables: the fields that identify a row, and the titles of columns."""
    columns = [["x", x], *([["series", "of"]] if len(series) > 1 else []), ["value", value]]
    if any(one.banded for one in series.values()):
        columns += [["low", "low"], ["high", "high"]]
    return {"keys": ["x"], "columns": columns, "wide": False}


def _finished(
    layers: Sequence[Any], rows: Sequence[Mapping[str, Any]], title: str, about: str, meta: Mapping[str, Any]
) -> alt.LayerChart:
    """Layers over shared data, with title and subtitle."""
    import altair as alt

    return alt.LayerChart(layer=list(layers), data=alt.InlineData(list(rows))).properties(
        title=alt.TitleParams(text=title, subtitle=textwrap.wrap(about, _WRAPPED)), usermeta=dict(meta)
    )


def _told() -> Any:
    """A tooltip with only the row's fields: Vega-Lite would compile titles into an expression, without escaping."""
    import altair as alt

    return alt.TooltipContent(content="data")


def _by_name(series: Mapping[str, Series], channel: Any, symbol: str) -> Any:
    """Encode the series by colour or dashes."""
    import altair as alt

    scale = alt.Scale(domain=list(series))
    if channel is alt.StrokeDash:
        scale.range = _DASHES[: len(series)]  # used again from the first one on where series are more
    size = 400 if symbol == "stroke" else 120  # long enough to show its dashes
    legend = alt.Legend(title=None, symbolType=symbol, symbolOpacity=1, symbolSize=size)
    return channel("series:N", sort=None, scale=scale, legend=legend)


def _reaches(values: Sequence[float]) -> list[dict[str, float]]:
    """For each of several distinct numbers, the interval in which it is the nearest, bounded by midpoints."""
    known = sorted(values)
    ends = [known[0], *((one + other) / 2 for one, other in pairwise(known)), known[-1]]
    return [{"from": ends[known.index(value)], "to": ends[known.index(value) + 1]} for value in values]
