"""Create a report of runs: the page, and a JSON file with every number in it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, Protocol

from polymerge.charts import need_charts
from polymerge.checkpoints.bounds import open_regular
from polymerge.durable import write_file
from polymerge.errors import OutputError, RecipeError, collecting, refuse
from polymerge.paths import given_path
from polymerge.reporting.advice import advise
from polymerge.reporting.knockout_section import ablation_section, knockout_section
from polymerge.reporting.merge_section import merge_section
from polymerge.reporting.overlap_section import overlap_section
from polymerge.reporting.page import GENERATOR, embedded, make_page, vega
from polymerge.reporting.records import Source, read_sources
from polymerge.reporting.score_section import scores_section
from polymerge.reporting.search_section import search_section

__all__ = ["Report", "collect", "report"]

FORMAT, VERSION = "polymerge report", 1

MOST_BYTES: Final = 3_900_000
"""Maximum size of the data in a page, to keep the page below 5 MB; the chart script has 0.9 MB."""

MOST_TENSORS: Final = 300
"""Rows that a shortened overlap keeps."""

_SECTIONS = {
    "merges": ("merge", merge_section),
    "overlaps": ("overlap", overlap_section),
    "searches": ("search", search_section),
    "knockouts": ("knockout", knockout_section),
    "ablations": ("ablation", ablation_section),
}


@dataclass(frozen=True)
class Report:
    """The files of a report.

    page, json  the two files
    data        the content of both
    """

    page: Path
    json: Path
    data: Mapping[str, Any]


class HasFolder(Protocol):
    """What a merge, a search, an evaluation, a knockout or a layer-wise merge returned."""

    @property
    def folder(self) -> Path | None:
        """Where its files are."""


AnySource = str | os.PathLike[str] | HasFolder


def report(
    sources: Sequence[AnySource] | AnySource,
    out: str | os.PathLike[str],
    title: str | None = None,
    *,
    json_file: str | os.PathLike[str] | None = None,
) -> Report:
    """Show runs on one self-contained page of less than 5 MB, with all its numbers in a JSON file beside it.

    sources    what merge, search, evaluate, knockout and layerwise returned, their folders, or files that they have
               written (of an overlap, the file that its `save` wrote), one or several; every record in a folder is
               shown, several of a kind one after another
    out        the page; an existing report is replaced, but no other file
    title      by default derived from the first merge
    json_file  by default `out` with the suffix .json

    raises MissingExtraError without altair or vl-convert, Refused with every problem of sources and paths,
    OutputError if the files cannot be written.
    """
    need_charts()
    page = given_path(out)
    named = page if page.name else page / "report"
    beside = given_path(json_file) if json_file is not None else named.with_suffix(".json")
    data: dict[str, Any] = {}
    with collecting():
        several = [sources] if isinstance(sources, str) or not isinstance(sources, Sequence) else sources
        if not several:
            refuse(RecipeError("no run to show: name its folder, or a file that it has written"))
        if page.resolve() == beside.resolve():
            refuse(RecipeError(f"{page}: page and JSON would be the same file. Name a page such as report.html"))
        for file in (page, beside):
            _check_free(file)
        data = collect([_place(one) for one in several], title)
    data = _fitted(data)
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    for file, content in ((beside, text + "\n"), (page, make_page(data))):
        write_file(file, content)
    return Report(page, beside, data)


def _place(source: AnySource) -> str | os.PathLike[str]:
    """The folder or file of a source."""
    if isinstance(source, str | os.PathLike):
        return source
    folder = getattr(source, "folder", None)
    if folder is None:
        hint = ". Write it with its `save`, and name the file" if hasattr(source, "save") else ""
        raise RecipeError(f"sources: {type(source).__name__} is in no folder{hint}")
    return Path(folder)


def collect(sources: Sequence[str | os.PathLike[str]], title: str | None = None) -> dict[str, Any]:
    """Collect everything that the page shows, as JSON data.

    sources  folders of runs, and files of them
    title    by default derived from the first merge

    raises Refused with every problem of any of them; inside `collecting` it returns an empty dict instead.
    """
    sections: dict[str, Any] = {name: [] for name in _SECTIONS} | {"scores": None}
    read: list[Source] = []
    with collecting() as wrong:
        read = read_sources(sources)
        for name, (kind, make) in _SECTIONS.items():
            for source in read:
                if source.kind == kind:
                    with collecting():
                        sections[name].append(make(source))
        scores = [one for one in read if one.kind == "scores"]
        if scores:
            sections["scores"] = scores_section(scores, sections["merges"])
    if wrong:
        return {}
    return {
        "format": FORMAT,
        "version": VERSION,
        "polymerge": importlib.metadata.version("polymerge"),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "title": title or _title(sections["merges"]),
        "sources": [{"kind": one.kind, "label": one.label, "file": str(one.file)} for one in read],
        **sections,
        "advice": [asdict(one) for one in advise(sections)],
    }


def _title(merges: Sequence[Mapping[str, Any]]) -> str:
    if not merges:
        return "What the runs say"
    models = [one["label"] for one in merges[0]["inputs"] if any(role.startswith("models[") for role in one["roles"])]
    named = f"{', '.join(models[:-1])} and {models[-1]}" if 1 < len(models) <= 4 else f"{len(models)} models"
    more = f", and {len(merges) - 1} more" if len(merges) > 1 else ""
    return f"{named}, merged by {merges[0]['method']}{more}"


def _fitted(data: dict[str, Any]) -> dict[str, Any]:
    forms = _shorter(data)
    while (size := len(embedded(data).encode())) > MOST_BYTES:
        smaller = next(forms, None)
        if smaller is None:
            total = (size + len(vega())) / 1e6
            raise RecipeError(f"the page would have {total:.1f} MB, more than 5: show fewer runs on one page")
        data = smaller
    return data


def _shorter(data: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Ever shorter versions of the report: first without the tensors of least conflict, then with plans by kind of
    tensor.
    """
    found = dict(data)
    found["overlaps"] = [{**one, "tensors": _worst(one)} for one in data["overlaps"]]
    yield found
    found = dict(found)
    found["merges"] = [{**one, "plan": _by_kind(one["plan"])} for one in data["merges"]]
    yield found


def _worst(overlap: Mapping[str, Any]) -> list[Any]:
    place = overlap["tensor_columns"].index("conflict_mass")
    return sorted(overlap["tensors"], key=lambda row: -(row[place] or 0))[:MOST_TENSORS]


def _by_kind(plan: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Collapse rows whose names differ only in numbers into one, with their count."""
    if plan is None:
        return None
    kinds: dict[str, list[Any]] = {}
    for name, canonical, fate, dtype, shape, settings, reason, count in plan["rows"]:
        row = [_pattern(name), _pattern(canonical), fate, dtype, shape, settings, reason, 0]
        kinds.setdefault(str(row), row)[-1] += count
    left_out = {str(row): row for row in ([label, _pattern(name), why] for label, name, why in plan["left_out"])}
    return {**plan, "rows": list(kinds.values()), "left_out": list(left_out.values()), "by_kind": True}


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "{i}", name)


def _check_free(file: Path) -> None:
    """Refuse a path whose folder does not exist, or that holds anything but a report."""
    if not file.parent.is_dir():
        refuse(OutputError(f"{file}: there is no folder {file.parent}. Make it, or name another place"))
        return
    if not file.exists():
        return
    if file.is_dir():
        refuse(OutputError(f"{file}: is a folder. Name a file, such as {file / 'report.html'}"))
        return
    try:
        with open_regular(file) as stream:
            start = stream.read(2000).decode("utf-8", "replace")
    except OSError as error:
        refuse(OutputError(f"{file}: exists and cannot be read: {error.strerror}. Name another file, or remove it"))
        return
    if GENERATOR not in start and f'"format": "{FORMAT}"' not in start:
        refuse(OutputError(f"{file}: exists and is no report. Name another file, or remove it"))
