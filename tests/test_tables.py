"""Rows as lines of text in columns; models as a table on a terminal."""

from __future__ import annotations

from pathlib import Path

from polymerge.cli.inspect import _model_lines, _model_table
from polymerge.planning.compare import inspect
from polymerge.tables import aligned
from running import two_llamas


def test_the_first_columns_begin_in_line_and_the_others_end_so() -> None:
    rows = [["task", "score", "of"], ["a", "1.5", "100"], ["longer", "22.25", ""]]
    assert aligned(rows) == ["task    score   of", "a         1.5  100", "longer  22.25"]
    assert aligned(rows, left=0)[1] == "     a    1.5  100"
    assert aligned(rows, left=2)[1] == "a       1.5    100"
    assert aligned([["one"]]) == ["one"]


def test_models_are_a_table_on_a_terminal_and_lines_elsewhere(tmp_path: Path) -> None:
    models = inspect(*two_llamas(tmp_path)).models
    head, *rows = _model_table(models)
    assert head.split()[:3] == ["model", "family", "text"]
    assert [row.split()[:2] for row in rows] == [["one", "llama"], ["other", "llama"]]
    assert len({len(line) for line in (head, *rows)}) == 1
    assert list(_model_table(())) == []
    assert next(_model_lines(models)).startswith("one: family llama, 5 tensors")
