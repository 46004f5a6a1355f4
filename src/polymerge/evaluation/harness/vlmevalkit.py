"""VLMEvalKit: its config file and command line, and its output.

`WORK/<model>/T<date>_G<hash>/<model>_<dataset>...`: `_acc.csv`, `..._score.csv` or `..._score.json` hold the score,
`..._result.xlsx` (or .tsv, .json) a row for each question with a `hit` where it is multiple choice, `..._auxmatch.xlsx`
one with a `score` where it is yes or no, `..._results.xlsx` one with an `eval_score` where it is a short answer, and
`<model>_<dataset>.xlsx` (or .tsv, .json) its answer: `index` and `prediction`. The same files also lie, as links, in
`WORK/<model>`.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, time, timedelta
from pathlib import Path
from typing import Any

import msgspec

from polymerge.checkpoints.bounds import RECORDS_BYTES, read_bounded
from polymerge.checkpoints.json_objects import read_json, read_text
from polymerge.errors import OutputError, PolymergeError, RecipeError, did_you_mean, refuse_if_any
from polymerge.evaluation.harness.registered_classes import DATASETS, Wrapper
from polymerge.evaluation.harness.rows import (
    AGAIN,
    BROKEN,
    Cells,
    Complaints,
    Documents,
    Row,
    documents,
    json_value,
    kept,
    sheet_cells,
    tsv_cells,
)
from polymerge.evaluation.predictions import failures_note, is_failure
from polymerge.evaluation.results import TaskResult

__all__ = ["REUSE", "command", "config", "datasets", "label", "place", "read", "read_answers", "read_rows"]

_ROWS = ("overall", "none", "validation", "val", "dev", "test", "average")
"""Rows of a score table, most likely published one first; the first that exists is used."""

_COLUMNS = ("Overall", "acc", "Relative Score (main)", "aAcc", "accuracy", "Final Score Norm", "Final Score", "score")
"""Columns, in the same way."""

REUSE = "--reuse"

_RUN = "Run VLMEvalKit again."
_WITHOUT_A_JUDGE = b"will use exact matching"
_UNJUDGED = (
    "a judge could not be reached, and exact matching took its place; the log does not say for which data set, so this "
    "score may be another than a judge's"
)
_ID, _ANSWER = "index", "prediction"
_DECIMAL = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e-\d+)?")
_NEAR_ENOUGH = 0.5  # below it ANLS is 0
_WHOLE = re.compile(r"0|[1-9][0-9]{0,17}")


def command(config_file: Path, out: Path) -> tuple[str, ...]:
    """Arguments of run.py, which begins anew; with `REUSE` it takes the answers that it finds."""
    return "--config", str(config_file), "--work-dir", str(out)


def label(name: str) -> str:
    """Turn a model's name into one that can be part of a file name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-") or "model"


def place(row: Wrapper, folder: Path, links: Path) -> Path:
    """Return a path to the checkpoint that is read as what it is: its own, or a link to it.

    raises RecipeError if the path of the link would be misread, too.
    """
    word = row.named or row.path_has
    names = [f"{word}-{folder.name}" if word else folder.name, word or "model"]
    found = next((path for path in (folder, *(links / name for name in names)) if _understood(row, path)), None)
    if found is None:
        raise RecipeError(
            f"VLMEvalKit reads the family off the path, and {links / names[1]} must have none of "
            f"{', '.join(row.path_lacks)}. Name another folder with -o"
        )
    return found


def _understood(row: Wrapper, path: Path) -> bool:
    text = str(path).lower()
    return row.named in path.name.lower() and row.path_has in text and not any(word in text for word in row.path_lacks)


def datasets(tasks: Sequence[str]) -> dict[str, str]:
    """Map data sets to VLMEvalKit's classes; a task is a name in the table, or NAME=CLASS.

    raises Refused with every unknown name.
    """
    named = {name: told or DATASETS.get(name, "") for name, _, told in (task.partition("=") for task in tasks)}
    refuse_if_any(
        RecipeError(
            f"--tasks: the class of the data set '{name}' is not known.{did_you_mean(name, DATASETS)} Say it as "
            f"{name}=CLASS, as vlmeval/dataset/__init__.py has it"
        )
        for name, found in named.items()
        if not found
    )
    return named


def config(row: Wrapper, model: str, folder: Path, names: Mapping[str, str]) -> str:
    """Format the config file: one entry for the model, and one per data set."""
    value = {
        "model": {model: {"class": row.kit, "model_path": str(folder), **row.kit_more}},
        "data": {name: {"class": found, "dataset": name} for name, found in names.items()},
    }
    return json.dumps(value, indent=1) + "\n"


def read(
    folder: Path, model: str, names: Sequence[str], before: set[Path], log: Path
) -> tuple[dict[str, TaskResult], list[PolymergeError]]:
    """Read the results below a model's folder, by data set, and say of which there are none.

    before  files that existed before it ran; they count if it reused them
    log     what it printed: whether a judge could not be reached stands nowhere else
    """
    results: dict[str, TaskResult] = {}
    wrong: list[PolymergeError] = []
    note = (_UNJUDGED,) if log.is_file() and _says(log, _WITHOUT_A_JUDGE) else ()
    for name in names:
        stem = f"{model}_{name}"
        longer = [f"{model}_{other}" for other in names if other.startswith(f"{name}_")]
        files = [
            path
            for path in sorted(folder.rglob(f"{stem}*"), key=lambda one: (one not in before, str(one)), reverse=True)
            if path.is_file()
            and re.match(r"[._]", path.name[len(stem) :])
            and not any(path.name.startswith(other) for other in longer)
        ]
        scores = [path for path in files if re.search(r"(_acc|_score|_rating)\.(csv|json)$", path.name)]
        if not scores:
            there = ", ".join(sorted({path.name for path in files})) or "nothing"
            wrong.append(OutputError(f"{folder}: VLMEvalKit wrote no score of {name}; it wrote {there}"))
            continue
        try:
            result = _task(_metrics(scores[0]), scores[0], *_marks(files))
            results[name] = msgspec.structs.replace(result, notes=(*result.notes, *note))
        except PolymergeError as error:
            wrong += error.problems
    return results, wrong


def _says(log: Path, words: bytes) -> bool:
    with log.open("rb") as lines:
        return any(words in line for line in lines)


def _task(metrics: Mapping[str, float], file: Path, marks: Sequence[Mapping[str, float]], failed: int) -> TaskResult:
    """The result in a file of scores.

    marks  of each question, in the ways in which the tool may have counted them
    """
    chosen = _chosen(metrics)
    notes: tuple[str, ...] = (failures_note(failed),) if failed else ()
    total = len(marks[0]) if marks else 0
    # what the tool makes another number of can be counted, too
    right = math.fsum(marks[0].values()) if marks and set(marks[0].values()) <= {0, 1} else None
    if chosen is None:
        return TaskResult(
            None, "points", right=right, total=total, failed=failed, metrics=metrics, notes=notes,
            reason=f"{file.name} has no overall number; all of its numbers are in metrics",
        )  # fmt: skip
    score = metrics[chosen]
    settings = {"scorer": f"{file.name.rpartition('_')[2]}: {chosen}"}
    # tables of multiple choice hold shares, the others percent
    share = file.name.endswith("_acc.csv") and chosen.startswith("split ") and 0 <= score <= 1
    for one in marks:
        mean = math.fsum(one.values()) / total
        same = any(abs(factor * score - 100 * mean) < 1e-4 for factor in (100, 1))
        if same and all(0 <= mark <= 1 for mark in one.values()):
            return TaskResult(
                100 * mean, right=math.fsum(one.values()), total=total, failed=failed, samples=one, metrics=metrics,
                notes=notes, settings=settings,
            )  # fmt: skip
    if marks:
        left = "they are left out" if right is None else "they are counted alone"
        notes = (*notes, f"the score is no mean of the rows' marks, so {left}")
    percent = share or chosen.rpartition(": ")[2] in ("acc", "aAcc", "accuracy", "Final Score Norm", "Overall")
    return TaskResult(
        100 * score if share else score, "%" if percent and score <= 100 else "points", right=right, total=total,
        failed=failed, metrics=metrics, notes=notes, settings=settings,
    )  # fmt: skip


def _chosen(metrics: Mapping[str, float]) -> str | None:
    """Choose the published number by its row and column; None if several rows could hold it."""
    rows = list(dict.fromkeys(name.rpartition(": ")[0] for name in metrics))
    ranked = sorted(rows, key=lambda row: next((n for n, one in enumerate(_ROWS) if row.lower().endswith(one)), 99))
    if len(rows) > 1 and not ranked[0].lower().endswith(_ROWS):
        return None
    for column in _COLUMNS:
        name = f"{ranked[0]}: {column}" if ranked[0] else column
        if name in metrics:
            return name
    return None


def _metrics(file: Path) -> dict[str, float]:
    """Read every number in a file of scores, as `column` or `row: column`.

    raises OutputError if it cannot be read or holds none.
    """
    if file.suffix == ".json":
        rows = _records(read_json(file, Any, unique_keys=False, error=OutputError, then=_RUN))
    else:
        try:
            rows = list(csv.DictReader(read_text(file, error=OutputError, then=_RUN).splitlines()))
        except csv.Error as error:
            raise OutputError(f"{file}: cannot be read: {error}. {_RUN}") from None
    found: dict[str, float] = {}
    for row in rows:
        words = [f"{name} {value}" for name, value in row.items() if name and _number(value) is None and value]
        for name, value in row.items():
            number = _number(value)
            if number is not None and name:
                found[f"{words[0]}: {name}" if words else name] = number
    if not found:
        raise OutputError(f"{file}: holds no number")
    return found


def _records(value: Any) -> list[dict[str, Any]]:
    """Records of a JSON file of scores: an object of numbers, a list of records, or an object of columns."""
    if isinstance(value, dict) and value and all(isinstance(cells, list) for cells in value.values()):
        return [dict(zip(value, cells, strict=False)) for cells in zip(*value.values(), strict=False)]
    records = value if isinstance(value, list) else [value]
    return [record for record in records if isinstance(record, dict)]


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _marks(files: Sequence[Path]) -> tuple[list[dict[str, float]], int]:
    """The correctness of each question, from the first table that has it, and the number of failed requests.

    Of short answers there are several: the mean over the right answers, the best of them, and that of ANLS.
    """
    for file in files:
        if not re.search(r"(_results?|_auxmatch|_judge)\.(xlsx|tsv|json)$", file.name):
            continue
        complaints = Complaints(file)
        rows = read_rows(complaints)
        complaints.refuse()
        marks = [(str(fields.get(_ID)), _mark(fields)) for _, fields in rows]
        if marks and all(mark for _, mark in marks):
            failed = sum(is_failure(str(fields.get(_ANSWER, ""))) for _, fields in rows)
            ways = min(len(mark) for _, mark in marks)
            return [{name: mark[way] for name, mark in marks} for way in range(ways)], failed
    return [], 0


def _mark(fields: Mapping[str, Any]) -> tuple[float, ...]:
    """The mark of a question, in each way that may be counted; empty if it has none."""
    value = fields.get("hit", fields.get("score", fields.get("eval_score")))
    if isinstance(value, bool) or value in ("True", "False"):
        return (float(value in (True, "True")),)
    mark = _number(value)
    if mark is None:
        return ()
    matches = [float(number) for number in _DECIMAL.findall(str(fields.get("eval_match", "")))]
    if not matches:
        return (mark,)
    near = 1 - min(matches)  # of DocVQA and InfoVQA, whose matches are distances
    return mark, max(matches), near if near >= _NEAR_ENOUGH else 0.0


# answers


def read_answers(rows: Iterable[Row], having: str | None, complaints: Complaints) -> Documents:
    """Read the documents of a table. Numbers count as text, and empty cells as empty answers."""
    return Documents(documents(kept(rows, having, complaints), _ID, _answer, complaints))


def _answer(fields: Mapping[str, Any]) -> str:
    cell = fields.get(_ANSWER, "")
    if not isinstance(cell, str | int | float | date | time | timedelta):  # a sheet turns `12:30` into a time
        raise ValueError(f"no text in '{_ANSWER}'")
    return str(cell)


def read_rows(complaints: Complaints) -> list[Row]:
    """Read the rows of an .xlsx, .tsv or .json table."""
    match complaints.file.suffix:
        case ".json":
            return json_rows(json_value(read_bounded(complaints.file, RECORDS_BYTES), "", complaints), complaints)
        case ".tsv":
            return list(_table(tsv_cells(complaints), complaints))
        case _:
            return list(_table(sheet_cells(complaints), complaints))


def json_rows(value: Any, complaints: Complaints) -> list[Row]:
    """The rows of a JSON table: a list of records."""
    if not isinstance(value, list):
        if value is not BROKEN:
            complaints.add("neither a log of lmms-eval nor a table of VLMEvalKit", "", "Move it away if it is neither.")
        return []
    rows: list[Row] = []
    names = {name for record in value if isinstance(record, dict) for name in record}
    if value and not _has_columns(names, complaints):
        return []
    for number, record in enumerate(value):
        if isinstance(record, dict):
            rows.append((f"record {number}", _filled(record.items())))
        else:
            complaints.add("no JSON object", f"record {number}", AGAIN)
    return rows


def _table(rows: Sequence[Cells], complaints: Complaints) -> Iterator[Row]:
    """The rows below the header as fields by column name; blank rows are skipped."""
    if complaints.places:  # which say why there are no cells
        return
    header = ["" if name is None else str(name) for name in rows[0][1]] if rows else []
    if not _has_columns(header, complaints):
        return
    for place, cells in rows[1:]:
        if any(cell not in (None, "") for cell in cells):
            if len(cells) != len(header):
                complaints.add(f"the header has {len(header)} cells, this has more or fewer", place, AGAIN)
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
    """Drop empty cells, for which pandas writes NaN, and convert the index to an integer if it is one."""
    filled = {
        name: cell
        for name, cell in cells
        if cell is not None and cell != "" and not (isinstance(cell, float) and math.isnan(cell))
    }
    number = filled.get(_ID)
    if (isinstance(number, float) and number.is_integer()) or (isinstance(number, str) and _WHOLE.fullmatch(number)):
        filled[_ID] = int(number)
    return filled
