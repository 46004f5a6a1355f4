"""A search as the page shows it: the curve of differences, the scores, what was chosen."""

from __future__ import annotations

from typing import Any

from polymerge.errors import PolymergeError, RecipeError
from polymerge.reporting.charts import Chart, heat, lines, measure
from polymerge.reporting.fields import Fields
from polymerge.reporting.records import Source

__all__ = ["search_section"]


def search_section(source: Source, problems: list[PolymergeError]) -> dict[str, Any]:
    """What search.json says, in the page's form; what is wrong with it is noted in `problems`."""
    data = Fields(source.data, str(source.file), problems)
    vary = [data.text("vary")] if isinstance(data.data["vary"], str) else data.texts("vary")
    values = data.values("values")
    points = [value if isinstance(value, list) else [value] for value in values]
    for place, point in enumerate(points):
        if len(point) != len(vary) or not all(isinstance(one, str | int | float) for one in point):
            problems.append(RecipeError(f"{source.file}: values[{place}] is no value of {', '.join(vary)}"))
            points[place] = [0] * len(vary)
    section: dict[str, Any] = {
        "label": source.label,
        "file": str(source.file),
        "polymerge": data.text("polymerge"),
        "vary": vary,
        "points": points,
        "chosen": _point(data.data["chosen"]),
        "chosen_by": data.text("chosen_by"),
        "prompts": None if data.missing("prompts") else data.count("prompts"),
        "seed": data.number_or_none("seed"),
        "criterion": None,
        "scorer": None,
        "charts": [],
    }
    if not points:
        problems.append(RecipeError(f"{source.file}: values is empty: nothing was searched"))
    if not data.missing("differences"):
        section |= {
            "criterion": data.text("criterion"),
            "compare": data.text("compare"),
            "smooth": data.count("smooth"),
            "candidates": data.numbers("candidates"),
            "minima": data.numbers("minima"),
        }
        section["differences"] = data.numbers("differences", len(section["candidates"]))
    if not data.missing("scores"):
        section |= {"scorer": data.text("scorer"), "scores": data.numbers("scores", len(points))}
        section["best"] = _point(data.data.get("best"))
    for name in ("sampler", "trials", "task"):
        if not data.missing(name):
            section[name] = data.data[name]
    section["rows"] = _rows(section)
    section["charts"] = _charts(section)
    return section


def _point(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _rows(section: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each value that was tried."""
    differences = dict(zip(section.get("candidates", ()), section.get("differences", ()), strict=False))
    scores = section.get("scores") or [None] * len(section["points"])
    return [
        {
            "trial": number,
            "point": point,
            "difference": differences.get(point[0]) if len(point) == 1 else None,
            "score": score,
            "chosen": point == section["chosen"],
        }
        for number, (point, score) in enumerate(zip(section["points"], scores, strict=False), 1)
    ]


def _charts(section: dict[str, Any]) -> list[Chart]:
    points, vary = section["points"], section["vary"]
    if len(vary) == 1 and "sampler" not in section:
        return _curves(section)
    scores = section.get("scores")
    if scores is None or not points:
        return []
    if len(vary) == 2 and "sampler" not in section:
        across, down = (list(dict.fromkeys(point[place] for point in points)) for place in (0, 1))
        by_point = {tuple(point): score for point, score in zip(points, scores, strict=False)}
        values = [[by_point.get((one, other)) for one in across] for other in down]
        named = f"score ({section['scorer']}, %)"
        return [heat("Scores of the grid", (vary[0], across), (vary[1], down), [measure(named, "", values)])]
    so_far = [max(scores[: place + 1]) for place in range(len(scores))]
    return [
        lines(
            "Scores of the trials", ("trial", list(range(1, len(scores) + 1))), f"score ({section['scorer']}, %)",
            [{"name": "score", "values": scores}, {"name": "best so far", "values": so_far}], zero=False,
        )
    ]  # fmt: skip


def _curves(section: dict[str, Any]) -> list[Chart]:
    """Differences and scores over one axis each: two panels, for one plot with two scales invites to read crossings."""
    axis = (section["vary"][0], [point[0] for point in section["points"]])
    marks = [{"at": section["chosen"][0], "label": "chosen"}]
    charts = []
    if "differences" in section:
        by_value = dict(zip(section["candidates"], section["differences"], strict=False))
        unit = "prompts" if section["compare"] == "exact" else "mean distance"
        charts.append(
            lines(
                "How much answers change", axis, f"difference to the neighbours ({unit})",
                [{"name": "difference", "values": [by_value.get(value) for value in axis[1]]}], marks=marks,
                about="less is steadier; the ends of the grid have one neighbour and cannot be chosen",
            )
        )  # fmt: skip
    if "scores" in section:
        best = section["best"][0]
        more = [{"at": best, "label": "best by labels"}] if best != section["chosen"][0] else []
        charts.append(
            lines(
                "Score by labels", axis, f"score ({section['scorer']}, %)",
                [{"name": "score", "values": section["scores"]}], marks=[*marks, *more], zero=False,
            )
        )  # fmt: skip
    return charts
