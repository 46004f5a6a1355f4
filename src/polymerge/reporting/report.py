"""Make a report of runs: the page, and a JSON file with every number in it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymerge.errors import OutputError, PolymergeError, RecipeError, refuse_if_any
from polymerge.reporting.collecting import FORMAT, collect
from polymerge.reporting.fitting import MOST_BYTES, shorter
from polymerge.reporting.page import GENERATOR, embedded, make_page

__all__ = ["Report", "report"]


@dataclass(frozen=True)
class Report:
    """What was made.

    page, json  the two files
    data        what both hold
    """

    page: Path
    json: Path
    data: Mapping[str, Any]


def report(
    sources: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    title: str | None = None,
    *,
    json_file: str | os.PathLike[str] | None = None,
) -> Report:
    """Show runs as one self-contained page of less than 5 MB, with every number of it in a JSON file beside it.

    sources    folders of merge, search, overlap, evaluate, knockout and ablate, or files that they have written; all
               that is found in a folder is shown, several of one kind one after the other
    out        the page; a report that is there is replaced, anything else is not
    title      of the page; by default made of the first merge
    json_file  by default OUT with .json at its end

    raises Refused with everything that is wrong with sources and paths, OutputError where nothing can be written.
    """
    page = Path(out)
    beside = Path(json_file) if json_file is not None else page.with_suffix(".json")
    problems: list[PolymergeError] = []
    if not sources:
        problems.append(RecipeError("no run to show: name its folder, or a file that it has written"))
    if page.resolve() == beside.resolve():
        problems.append(RecipeError(f"{page}: page and JSON would be the same file. Name a page such as report.html"))
    problems += [problem for file in (page, beside) if (problem := _in_the_way(file)) is not None]
    data: dict[str, Any] = {}
    try:
        data = collect(sources, title)
    except PolymergeError as error:
        problems += getattr(error, "problems", (error,))
    refuse_if_any(problems)
    data = _fitted(data)
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    for file, content in ((beside, text + "\n"), (page, make_page(data))):
        _write(file, content)
    return Report(page, beside, data)


def _fitted(data: dict[str, Any]) -> dict[str, Any]:
    forms = shorter(data)
    while len(embedded(data).encode()) > MOST_BYTES:
        smaller = next(forms, None)
        if smaller is None:
            raise RecipeError(
                f"the page would have {len(embedded(data)) / 1e6:.1f} MB, more than 5: show fewer runs on one page"
            )
        data = smaller
    return data


def _in_the_way(file: Path) -> PolymergeError | None:
    """What is at a path already, if it is no report."""
    if not file.parent.is_dir():
        return OutputError(f"{file}: there is no folder {file.parent}. Make it, or name another place")
    if not file.exists():
        return None
    if file.is_dir():
        return OutputError(f"{file}: is a folder. Name a file, such as {file / 'report.html'}")
    with file.open("rb") as stream:
        start = stream.read(2000).decode("utf-8", "replace")
    if GENERATOR in start or f'"format": "{FORMAT}"' in start:
        return None
    return OutputError(f"{file}: exists and is no report. Name another file with -o or --json, or remove it")


def _write(file: Path, content: str) -> None:
    """All of the new, or what was there before."""
    beside = file.with_name(f".{file.name}.new")
    try:
        beside.write_text(content, encoding="utf-8")
        beside.replace(file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OutputError(f"{file}: cannot be written: {error.strerror}") from None
