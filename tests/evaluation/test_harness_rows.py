"""Tables of other programs: what an .xlsx file or a table of text may unfold to."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from polymerge.errors import PolymergeError
from polymerge.evaluation.harness import rows
from polymerge.evaluation.harness.rows import Complaints, sheet_cells, tsv_cells

TABLE = (("index", "prediction"), (0, "a"), (1, "=1+1"))


def sheet(file: Path, *cells: tuple[Any, ...]) -> Path:
    book = openpyxl.Workbook()
    for row in cells or TABLE:
        book.active.append(row)
    book.save(file)
    return file


def changed(file: Path, name: str, before: bytes, after: bytes) -> Path:
    with zipfile.ZipFile(file) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    assert before in parts[name]
    parts[name] = parts[name].replace(before, after, 1)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for part, content in parts.items():
            archive.writestr(part, content)
    return file


def complaint(file: Path) -> str:
    complaints = Complaints(file)
    assert (tsv_cells if file.suffix == ".tsv" else sheet_cells)(complaints) == []
    with pytest.raises(PolymergeError) as caught:
        complaints.refuse()
    return str(caught.value)


def test_a_sheet_is_read_up_to_its_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = sheet(tmp_path / "x.xlsx")
    with zipfile.ZipFile(file) as archive:
        xml = [archive.read(part) for part in archive.namelist() if part.endswith((".xml", ".rels"))]
    bounds = {"SHEET_BYTES": sum(map(len, xml)), "SHEET_TAGS": sum(one.count(b"<") for one in xml), "TABLE_CELLS": 9}
    for name, bound in bounds.items():
        monkeypatch.setattr(rows, name, bound)
    assert [list(cells) for _, cells in sheet_cells(Complaints(file))] == [list(one) for one in TABLE]
    for name, bound in bounds.items():
        with monkeypatch.context() as lower:
            lower.setattr(rows, name, bound - 1)
            assert f"more than {bound - 1} " in complaint(file)


def test_a_cell_far_to_the_right_brings_its_empty_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "TABLE_CELLS", 100_000)
    file = sheet(tmp_path / "x.xlsx")
    many = b"".join(b'<row r="%d"><c r="XFD%d"/></row>' % (number, number) for number in range(2, 12))
    changed(file, "xl/worksheets/sheet1.xml", b"</sheetData>", many + b"</sheetData>")
    assert "it has more than 100000 cells" in complaint(file)


def test_a_row_far_below_brings_the_empty_ones_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "TABLE_CELLS", 100_000)
    file = changed(sheet(tmp_path / "x.xlsx"), "xl/worksheets/sheet1.xml", b'<row r="3"', b'<row r="3000000000"')
    assert "it has more than 100000 cells" in complaint(file)


@pytest.mark.parametrize("start", [b'<!DOCTYPE a [<!ENTITY a "b">]>', b" " * 2**20])
def test_entities_are_refused(tmp_path: Path, start: bytes) -> None:
    file = changed(sheet(tmp_path / "x.xlsx"), "xl/worksheets/sheet1.xml", b"<worksheet", start + b"<worksheet")
    assert "'xl/worksheets/sheet1.xml' does not begin as a part of a sheet does" in complaint(file)


def test_cells_of_text_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.tsv"
    file.write_text("a\tb\n1\t2\n", encoding="utf-8")
    monkeypatch.setattr(rows, "TABLE_CELLS", 4)
    assert [list(cells) for _, cells in tsv_cells(Complaints(file))] == [["a", "b"], ["1", "2"]]
    monkeypatch.setattr(rows, "TABLE_CELLS", 3)
    assert "more than 3 cells" in complaint(file)
