"""Answers as VLMEvalKit writes them: a table `<model>_<dataset>.xlsx`, .tsv or .json with `index` and `prediction`."""

from __future__ import annotations

import csv
import importlib
import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, time, timedelta
from typing import Any

from polymerge.errors import MissingExtraError
from polymerge.evaluation.logs.rows import Complaints, Documents, Row, documents, kept

__all__ = ["json_rows", "read_vlmevalkit", "sheet_rows", "tsv_rows"]

_ID, _ANSWER = "index", "prediction"
_WHOLE = re.compile(r"0|[1-9][0-9]{0,17}")
_AGAIN = "Generate these answers again, or mend the file."


def read_vlmevalkit(rows: Iterable[Row], keep: str | None, complaints: Complaints) -> Documents:
    """The documents of a table. A number counts as its text, and an empty cell as an empty answer."""
    return Documents(documents(kept(rows, keep, complaints), _ID, _answer, complaints))


def _answer(fields: Mapping[str, Any]) -> str:
    cell = fields.get(_ANSWER, "")
    if not isinstance(cell, str | int | float | date | time | timedelta):  # a sheet turns `12:30` into a time
        raise ValueError(f"no text in '{_ANSWER}'")
    return str(cell)


def json_rows(value: Any, complaints: Complaints) -> list[Row]:
    """The rows of a JSON table: a list of records, or an object of columns, each a list or an object by row."""
    if isinstance(value, dict):
        if not _has_columns(value, complaints):
            return []
        columns = {name: _column(cells) for name, cells in value.items()}
        lengths = {len(cells) for cells in columns.values()}
        if len(lengths) != 1:
            complaints.add("its columns are no lists of one length", "", _AGAIN)
            return []
        records: Sequence[Any] = [
            dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)
        ]
    else:
        records = value if isinstance(value, list) else []
        names = {name for record in records if isinstance(record, dict) for name in record}
        if records and not _has_columns(names, complaints):
            return []
    rows: list[Row] = []
    for number, record in enumerate(records):
        if isinstance(record, dict):
            rows.append((f"record {number}", _filled(record.items())))
        else:
            complaints.add("no JSON object", f"record {number}", _AGAIN)
    return rows


def _column(cells: Any) -> Sequence[Any]:
    if isinstance(cells, dict):
        return list(cells.values())
    return cells if isinstance(cells, list) else ()


def tsv_rows(complaints: Complaints) -> Iterator[Row]:
    """The rows of a table with tabs between its cells and quotes where they are needed."""
    data = complaints.file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        complaints.add(f"not UTF-8, byte {error.start} is 0x{data[error.start]:02x}", "", _AGAIN)
        return
    usual = csv.field_size_limit(max(len(text), 1))  # some tables carry their images
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True)
    rows: list[tuple[str, list[str]]] = []
    try:
        rows.extend((f"line {reader.line_num}", cells) for cells in reader)
    except csv.Error as error:
        complaints.add(f"not a table, {error}", f"line {reader.line_num}", _AGAIN)
    finally:
        csv.field_size_limit(usual)
    yield from _table(rows, complaints)


def sheet_rows(complaints: Complaints) -> Iterator[Row]:
    """The rows of the first sheet of an .xlsx file."""
    try:
        openpyxl = importlib.import_module("openpyxl")
    except ImportError:
        raise MissingExtraError(f"{complaints.file}: needs openpyxl: pip install 'polymerge[search]'") from None
    try:
        with warnings.catch_warnings(), complaints.file.open("rb") as file:
            warnings.simplefilter("ignore")  # about styles, which nobody reads
            book = openpyxl.load_workbook(file, read_only=True)  # formulas as text: a model may well answer `=5`
            sheet = book.worksheets[0]
            sheet.reset_dimensions()  # some writers state too few
            rows = list(sheet.iter_rows(values_only=True))
            book.close()
    except OSError:
        raise
    except Exception as error:  # openpyxl raises whatever it stumbles over in the zip or its XML
        complaints.add(f"not an .xlsx file that can be read, {type(error).__name__}: {error}", "", _AGAIN)
        return
    width = max((place for row in rows[:1] for place, name in enumerate(row, 1) if name is not None), default=0)
    padded = [[*row, *[None] * (width - len(row))] for row in rows]  # a row ends at its last cell that is not empty
    trimmed = [row[:width] + [cell for cell in row[width:] if cell is not None] for row in padded]
    yield from _table([(f"row {number}", cells) for number, cells in enumerate(trimmed, 1)], complaints)


def _table(rows: Sequence[tuple[str, Sequence[Any]]], complaints: Complaints) -> Iterator[Row]:
    header = ["" if name is None else str(name) for name in rows[0][1]] if rows else []
    if not _has_columns(header, complaints):
        return
    for place, cells in rows[1:]:
        if any(cell not in (None, "") for cell in cells):
            if len(cells) != len(header):
                complaints.add(f"the header has {len(header)} cells, this has more or fewer", place, _AGAIN)
            else:
                yield place, _filled(zip(header, cells, strict=True))


def _has_columns(names: Iterable[str], complaints: Complaints) -> bool:
    there = list(names)
    absent = " and ".join(f"'{name}'" for name in (_ID, _ANSWER) if name not in there)
    if absent:
        complaints.add(
            f"no column {absent} (columns: {', '.join(there) or 'none'})", "", "Is it VLMEvalKit's file of answers?"
        )
    return not absent


def _filled(cells: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The cells that hold something; pandas writes NaN for one that is empty."""
    filled = {
        name: cell
        for name, cell in cells
        if cell is not None and cell != "" and not (isinstance(cell, float) and math.isnan(cell))
    }
    number = filled.get(_ID)
    if (isinstance(number, float) and number.is_integer()) or (isinstance(number, str) and _WHOLE.fullmatch(number)):
        filled[_ID] = int(number)
    return filled
