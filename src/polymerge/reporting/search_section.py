"""The page's search section: the curve of differences, the scores, and the choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from msgspec import Meta, Struct, to_builtins

from polymerge.charts import figure
from polymerge.errors import refuse_if_any
from polymerge.reporting.records import Count, Number, Source
from polymerge.tuning.curve_plot import search_charts

__all__ = ["search_section"]


_Difference = Annotated[int, Meta(ge=0)] | Annotated[float, Meta(ge=0)]


class Task(Struct, kw_only=True):
    """A task that candidates were scored on: its scorer, and a score for each of the values."""

    scorer: str
    prompts: Count
    scores: list[Number]


class OnFront(Struct, kw_only=True):
    """A value on the Pareto front, with its score on each task."""

    value: Any
    scores: dict[str, Number]


class Search(Struct, kw_only=True):
    """The members of search.json that the page shows; a search has differences, scores, or both, or a front."""

    polymerge: str
    vary: str | list[str]
    values: Annotated[list[Any], Meta(min_length=1)]
    chosen: Any
    chosen_by: str
    prompts: Count | None = None
    seed: Number | None = None
    differences: Annotated[list[_Difference], Meta(min_length=1)] | None = None
    criterion: str | None = None
    compare: str | None = None
    smooth: Count | None = None
    candidates: list[Number] | None = None
    minima: list[Number] | None = None
    scores: list[Number] | None = None
    scorer: str | None = None
    best: Any = None
    sampler: Any = None
    trials: Any = None
    task: Any = None
    tasks: Annotated[dict[str, Task], Meta(min_length=2)] | None = None
    front: Annotated[list[OnFront], Meta(min_length=1)] | None = None
    quick: Count | None = None
    population: Count | None = None

    @property
    def names(self) -> list[str]:
        """The names of the varied parameters."""
        return [self.vary] if isinstance(self.vary, str) else self.vary


_COMPARED = ("criterion", "compare", "smooth", "candidates", "minima")
_SCORED = ("scorer", "best")


def search_section(source: Source) -> dict[str, Any]:
    """The page's section on a search.

    raises RecipeError, or Refused for several problems.
    """
    record = source.read(Search)
    refuse_if_any(map(source.wrong, _faults(record)))
    section: dict[str, Any] = {
        "label": source.label,
        "file": str(source.file),
        "polymerge": record.polymerge,
        "vary": record.names,
        "points": [_point(value) for value in record.values],
        "chosen": _point(record.chosen),
        "chosen_by": record.chosen_by,
        "prompts": record.prompts,
        "seed": record.seed,
        "criterion": None,
        "scorer": None,
    }
    if record.differences is not None:
        section |= {name: getattr(record, name) for name in (*_COMPARED, "differences")}
    if record.scores is not None:
        section |= {"scorer": record.scorer, "scores": record.scores, "best": _point(record.best)}
    section |= {name: found for name in ("sampler", "trials", "task") if (found := getattr(record, name)) is not None}
    section["rows"] = _rows(section) if record.front is None else _rows_of_front(section, record.front)
    if record.front is not None and record.tasks is not None:
        section |= {"tasks": {name: one.scorer for name, one in record.tasks.items()}, "quick": record.quick}
    said = {name: value for name, value in to_builtins(record).items() if value is not None}
    section["charts"] = [figure({"": chart}) for chart in search_charts(said)]
    return section


def _faults(record: Search) -> Iterator[str]:
    said = {f"values[{place}]": value for place, value in enumerate(record.values)}
    said |= {f"front[{place}].value": one.value for place, one in enumerate(record.front or ())}
    said |= {name: value for name in ("chosen", "best") if (value := getattr(record, name)) is not None}
    for name, value in said.items():
        point = _point(value)
        if len(point) != len(record.names) or not all(isinstance(one, str | int | float) for one in point):
            yield f"{name} is no value of {', '.join(record.names)}"
    needed = [
        "chosen",
        *(_COMPARED if record.differences is not None else ()),
        *(_SCORED if record.scores is not None else ()),
        *(("tasks",) if record.front is not None else ()),
        *(("front",) if record.tasks is not None else ()),
    ]
    yield from (f"{name} is missing" for name in needed if getattr(record, name) is None)
    for name, beside in (("differences", record.candidates), ("scores", record.values)):
        found = getattr(record, name)
        if found is not None and beside is not None and len(found) != len(beside):
            yield f"{name} has {len(found)} numbers for {len(beside)}"

    for name, task in (record.tasks or {}).items():
        if len(task.scores) != len(record.values):
            yield f"tasks.{name} has {len(task.scores)} scores for {len(record.values)} values"
    for place, one in enumerate(record.front or ()):
        if record.tasks is not None and one.scores.keys() != record.tasks.keys():
            yield f"front[{place}] has scores of {', '.join(one.scores)}, and the tasks are {', '.join(record.tasks)}"
    if record.front is not None and record.chosen not in [one.value for one in record.front]:
        yield "chosen is not on the front"


def _point(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _rows(section: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per candidate."""
    differences = dict(zip(section.get("candidates", ()), section.get("differences", ()), strict=True))
    scores = section.get("scores") or [None] * len(section["points"])
    return [
        {
            "trial": number,
            "point": point,
            "difference": differences.get(point[0]) if len(point) == 1 else None,
            "score": score,
            "chosen": point == section["chosen"],
        }
        for number, (point, score) in enumerate(zip(section["points"], scores, strict=True), 1)
    ]


def _rows_of_front(section: dict[str, Any], front: Sequence[OnFront]) -> list[dict[str, Any]]:
    """One row per value on the front."""
    points = [_point(one.value) for one in front]
    return [
        {"trial": section["points"].index(point) + 1 if point in section["points"] else None, "point": point,
         "difference": None, "score": None, "scores": list(one.scores.values()), "chosen": point == section["chosen"]}
        for point, one in zip(points, front, strict=True)
    ]  # fmt: skip
