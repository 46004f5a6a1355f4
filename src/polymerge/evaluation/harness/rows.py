"""Rows of an answer file, and the documents built from them; problems are grouped by kind before they are raised."""

from __future__ import annotations

import csv
import importlib
import io
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from polymerge.checkpoints.bounds import (
    RECORDS_BYTES,
    SHEET_BYTES,
    SHEET_TAGS,
    TABLE_CELLS,
    lines_of,
    open_regular,
    read_bounded,
)
from polymerge.checkpoints.json_objects import parse_json
from polymerge.errors import MissingExtraError, PolymergeError, RecipeError, refuse, shown
from polymerge.evaluation.predictions import at_most_shown

__all__ = [
    "AGAIN",
    "BROKEN",
    "Cells",
    "Complaints",
    "Documents",
    "Row",
    "documents",
    "json_lines",
    "json_value",
    "kept",
    "sheet_cells",
    "tsv_cells",
]

AGAIN = "Generate these answers again, or mend the file."

Row = tuple[str, Mapping[str, Any]]
"""A row: its location in the file, such as `line 3`, and its fields."""

Cells = tuple[str, Sequence[Any]]
"""A row of a table: its location in the file, and its cells."""

_START_BYTES = 1 << 20
_ELEMENT = re.compile(rb"<[A-Za-z]")

BROKEN = object()
"""Placeholder for a value that could not be read."""

_SAME_FIELD = frozenset({"mme_percetion_score", "mme_perception_score"})
"""lmms-eval used the first spelling for years."""


@dataclass(frozen=True)
class Complaints:
    """Problems of one file, grouped by kind, so that one broken run does not fill the screen."""

    file: Path
    places: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    broken: list[PolymergeError] = field(default_factory=list)
    """JSON syntax errors, one each."""

    def add(self, what: str, place: str, then: str) -> None:
        """Record a problem, its location in the file, and the next step."""
        self.places.setdefault((what, then), []).append(place)

    def refuse(self) -> None:
        """Refuse the file if it has problems: one error per kind, with the first few locations."""
        with at_most_shown(self.file):
            refuse(*self.broken)
            for (what, then), places in self.places.items():
                shown = ", ".join(place for place in places[:3] if place)
                more = f" and {len(places) - 3} more" if len(places) > 3 else ""
                refuse(RecipeError(f"{self.file}: {f'{shown}{more}: ' if shown else ''}{what}. {then}"))


@dataclass(frozen=True)
class Documents:
    """The answers of one candidate."""

    answers: Mapping[int | str, str]
    score: float | None = None
    """The mean of the tool's own score per document, if it has exactly one."""
    notes: tuple[str, ...] = ()


def json_value(text: bytes, place: str, complaints: Complaints) -> Any:
    """Parse JSON; returns BROKEN, with the error recorded, if it is malformed."""
    where = f"{complaints.file}: {place}" if place else str(complaints.file)
    try:
        return parse_json(text, where, Any, unique_keys=False, lenient=True, error=RecipeError, then=AGAIN)
    except PolymergeError as error:
        complaints.broken.append(error)
        return BROKEN


def json_lines(complaints: Complaints) -> Iterator[Row]:
    """Iterate over the objects of a JSON-lines file; NaN, which the tools write, is accepted as a number."""
    with open_regular(complaints.file) as stream:
        for number, line in enumerate(lines_of(stream), 1):
            if line.strip():
                value = json_value(line.rstrip(b"\r\n"), f"line {number}", complaints)
                if isinstance(value, dict):
                    yield f"line {number}", value
                elif value is not BROKEN:
                    complaints.add("no JSON object", f"line {number}", "Each line is one object.")


def tsv_cells(complaints: Complaints) -> list[Cells]:
    """Read the cells of a tab-separated table; empty if its encoding is broken."""
    data = read_bounded(complaints.file, RECORDS_BYTES)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        complaints.add(f"is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}", "", AGAIN)
        return []
    if text.count("\t") + text.count("\n") > TABLE_CELLS:
        complaints.add(f"more than {TABLE_CELLS} cells", "", AGAIN)
        return []
    usual = csv.field_size_limit(max(len(text), 1))  # some tables carry their images
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True)
    rows: list[Cells] = []
    try:
        rows.extend((f"line {reader.line_num}", cells) for cells in reader)
    except csv.Error as error:
        complaints.add(f"not a table, {error}", f"line {reader.line_num}", AGAIN)
    finally:
        csv.field_size_limit(usual)
    return rows


def sheet_cells(complaints: Complaints) -> list[Cells]:
    """Read the cells of the first sheet of an .xlsx file, as many per row as its header has."""
    try:
        openpyxl = importlib.import_module("openpyxl")
    except ImportError:
        raise MissingExtraError(f"{complaints.file}: needs openpyxl: pip install 'polymerge[search]'") from None
    try:
        with warnings.catch_warnings(), open_regular(complaints.file, RECORDS_BYTES) as file:
            _check_parts(file)
            warnings.simplefilter("ignore")  # about styles, which nobody reads
            book = openpyxl.load_workbook(file, read_only=True)  # formulas as text: a model may well answer `=5`
            sheet = book.worksheets[0]
            sheet.reset_dimensions()  # some writers state too few
            rows = list(_few_enough(sheet.iter_rows(values_only=True)))
            book.close()
    except OSError:
        raise
    except Exception as error:  # openpyxl raises whatever it stumbles over in the zip or its XML
        complaints.add(f"not an .xlsx file that can be read, {type(error).__name__}: {error}", "", AGAIN)
        return []
    width = max((place for row in rows[:1] for place, name in enumerate(row, 1) if name is not None), default=0)
    padded = [[*row, *[None] * (width - len(row))] for row in rows]  # a row ends at its last cell that is not empty
    trimmed = [row[:width] + [cell for cell in row[width:] if cell is not None] for row in padded]
    return [(f"row {number}", cells) for number, cells in enumerate(trimmed, 1)]


def _check_parts(file: BinaryIO) -> None:
    """Raise ValueError for a sheet that unfolds to more than anybody wrote: openpyxl reads all of it."""
    tags = 0
    with zipfile.ZipFile(file) as archive:
        parts = [part for part in archive.infolist() if part.filename.lower().endswith((".xml", ".rels"))]
        if sum(part.file_size for part in parts) > SHEET_BYTES:  # no more than what it says is unpacked
            raise ValueError(f"it unfolds to more than {SHEET_BYTES} bytes")
        for part in parts:
            with archive.open(part) as stream:
                start = stream.read(_START_BYTES)
                if b"<!DOCTYPE" in start or not _ELEMENT.search(start):  # entities; the latter in UTF-16 or further on
                    raise ValueError(f"'{shown(part.filename)}' does not begin as a part of a sheet does")
                tags += start.count(b"<")
                while tags <= SHEET_TAGS and (more := stream.read(_START_BYTES)):
                    tags += more.count(b"<")
    if tags > SHEET_TAGS:
        raise ValueError(f"it has more than {SHEET_TAGS} tags")


def _few_enough(rows: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """The rows of a sheet; a cell that says to be in row or column 16384 brings the empty ones before it."""
    left = TABLE_CELLS
    for row in rows:
        left -= len(row) + 1
        if left < 0:
            raise ValueError(f"it has more than {TABLE_CELLS} cells")
        yield row


def kept(rows: Iterable[Row], having: str | None, complaints: Complaints) -> list[Row]:
    """Select the rows that have a field; all rows if `having` is None."""
    every = list(rows)
    if not every and not complaints.places and not complaints.broken:
        complaints.add("holds no documents", "", "Generate these answers again.")
    if having is None:
        return every
    spellings = _SAME_FIELD if having in _SAME_FIELD else {having}
    found = [row for row in every if spellings & row[1].keys()]
    if every and not found:
        there = ", ".join(sorted({str(name) for _, fields in every for name in fields}))
        complaints.add(
            f"none of {len(every)} documents has '{having}'", "", f"Its fields: {there}. Is it the task that you mean?"
        )
    return found


def documents(
    rows: Iterable[Row],
    identity: str,
    answer: Callable[[Mapping[str, Any]], str],
    complaints: Complaints,
    *,
    repeats: bool = False,
) -> dict[int | str, str]:
    """Map each document's id to its answer.

    identity  the field that identifies documents, an integer or a string; it must be unique
    answer    maps a row's fields to its answer, or raises ValueError with the reason why there is none
    repeats   accept documents with the same identity if their answers are equal
    """
    found: dict[int | str, str] = {}
    places: dict[str, str] = {}
    for place, fields in rows:
        number = fields.get(identity)
        if not isinstance(number, int | str) or isinstance(number, bool) or number == "":
            complaints.add(f"no '{identity}' that is a whole number or a text", place, "Documents are aligned by it.")
            continue
        try:
            text = answer(fields)
            text.encode()
        except UnicodeEncodeError:
            complaints.add("half a surrogate pair in the answer", f"{identity} {number} ({place})", "Mend the file.")
        except ValueError as error:
            complaints.add(str(error), f"{identity} {number} ({place})", "Generate these answers again.")
        else:
            before = places.setdefault(str(number), place)
            if before is place or (repeats and found.get(number) == text):
                found[number] = text
                continue
            complaints.add(
                f"the same '{identity}' twice",
                f"{identity} {number} ({before} and {place})",
                "Did two runs write into one file? Keep the lines of one.",
            )
    return found
