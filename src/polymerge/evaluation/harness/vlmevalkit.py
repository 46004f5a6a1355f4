"""VLMEvalKit: its config file and command line, and what it writes.

`WORK/<model>/T<date>_G<hash>/<model>_<dataset>...`: `_acc.csv`, `..._score.csv` or `..._score.json` hold the score,
`..._result.xlsx` (or .tsv, .json) a row for each question, where it is multiple choice with a `hit`. The same files
also lie, as links, in `WORK/<model>`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from math import fsum, isfinite
from pathlib import Path
from typing import Any

from polymerge.errors import OutputError, PolymergeError, RecipeError, did_you_mean, refuse_if_any
from polymerge.evaluation.harness.registered_classes import DATASETS, Wrapper
from polymerge.evaluation.json_files import Broken, json_of, text_of_file
from polymerge.evaluation.logs.rows import Complaints
from polymerge.evaluation.logs.vlmevalkit_logs import json_rows, sheet_rows, tsv_rows
from polymerge.evaluation.predictions import failures_note, is_failure
from polymerge.evaluation.results import TaskResult

__all__ = ["command", "config", "datasets", "label", "place", "read"]

_ROWS = ("overall", "none", "validation", "val", "dev", "test", "average")
"""Which row of a table of scores is the one that is published, the first that is there."""

_COLUMNS = ("Overall", "acc", "Relative Score (main)", "aAcc", "accuracy", "Final Score Norm", "Final Score", "score")
"""Which column is, the same way."""


def command(config_file: Path, out: Path) -> tuple[str, ...]:
    """What follows run.py; what an earlier run of the same has answered is used again."""
    return "--config", str(config_file), "--work-dir", str(out), "--reuse"


def label(name: str) -> str:
    """A model's name that can be part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-") or "model"


def place(row: Wrapper, folder: Path, links: Path) -> Path:
    """A path to the folder by which VLMEvalKit takes it for what it is: its own, or that of a link to it.

    raises RecipeError where the path of the link would be misread, too.
    """
    if _understood(row, folder):
        return folder
    link = links / (row.path_has[0] if row.path_has else "model")
    if not _understood(row, link):
        raise RecipeError(
            f"VLMEvalKit reads the family off the path, and {link} must have none of {', '.join(row.path_lacks)}. "
            "Name another folder with -o"
        )
    return link


def _understood(row: Wrapper, path: Path) -> bool:
    text = str(path).lower()
    return (not row.path_has or any(word in text for word in row.path_has)) and not any(
        word in text for word in row.path_lacks
    )


def datasets(tasks: Sequence[str]) -> dict[str, str]:
    """VLMEvalKit's class of each data set; a task is a name of the table, or NAME=CLASS.

    raises Refused with every name that is not known.
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
    """The config file: the model's entry, and one for each data set."""
    value = {
        "model": {model: {"class": row.kit, "model_path": str(folder), **row.kit_more}},
        "data": {name: {"class": found, "dataset": name} for name, found in names.items()},
    }
    return json.dumps(value, indent=1) + "\n"


def read(
    folder: Path, model: str, names: Sequence[str], before: set[Path], problems: list[PolymergeError]
) -> Mapping[str, TaskResult]:
    """The results below a model's folder, by data set; a problem for each that has none.

    before  files that were there before it ran; they count where it used them again
    """
    results = {}
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
            problems.append(OutputError(f"{folder}: VLMEvalKit wrote no score of {name}; it wrote {there}"))
            continue
        metrics = _numbers(scores[0], problems)
        if metrics:
            results[name] = _task(metrics, scores[0], *_hits(files, problems))
        elif metrics is not None:
            problems.append(OutputError(f"{scores[0]}: holds no number"))
    return results


def _task(metrics: Mapping[str, float], file: Path, hits: Mapping[str, float], failed: int) -> TaskResult:
    chosen = _chosen(metrics)
    notes: tuple[str, ...] = (failures_note(failed),) if failed else ()
    if chosen is None:
        return TaskResult(
            None, "points", total=len(hits), failed=failed, metrics=metrics, notes=notes,
            reason=f"{file.name} has no overall number; all of its numbers are in metrics",
        )  # fmt: skip
    score = metrics[chosen]
    settings = {"scorer": f"{file.name.rpartition('_')[2]}: {chosen}"}
    mean = fsum(hits.values()) / len(hits) if hits else None
    # tables of multiple choice hold shares, the others percent
    share = file.name.endswith("_acc.csv") and chosen.startswith("split ") and 0 <= score <= 1
    for factor in (100, 1):
        if mean is not None and abs(factor * score - 100 * mean) < 1e-4 and all(0 <= hit <= 1 for hit in hits.values()):
            return TaskResult(
                100 * mean, right=fsum(hits.values()), total=len(hits), failed=failed, samples=hits, metrics=metrics,
                notes=notes, settings=settings,
            )  # fmt: skip
    if hits:
        notes = (*notes, "the score is no mean of the rows' hits, so they are left out")
    percent = share or chosen.rpartition(": ")[2] in ("acc", "aAcc", "accuracy", "Final Score Norm", "Overall")
    return TaskResult(
        100 * score if share else score, "%" if percent and score <= 100 else "points", total=len(hits),
        failed=failed, metrics=metrics, notes=notes, settings=settings,
    )  # fmt: skip


def _chosen(metrics: Mapping[str, float]) -> str | None:
    """The number that is published, by its row and column; that of the only row where there is one."""
    rows = list(dict.fromkeys(name.rpartition(": ")[0] for name in metrics))
    ranked = sorted(rows, key=lambda row: next((n for n, one in enumerate(_ROWS) if row.lower().endswith(one)), 99))
    if len(rows) > 1 and not ranked[0].lower().endswith(_ROWS):
        return None
    for column in _COLUMNS:
        name = f"{ranked[0]}: {column}" if ranked[0] else column
        if name in metrics:
            return name
    return None


def _numbers(file: Path, problems: list[PolymergeError]) -> dict[str, float] | None:
    """Every number of a file of scores, as `column` or `row: column`; None, and a problem, where it cannot be read."""
    try:
        text = text_of_file(file)
        rows = _json_rows(json_of(text)) if file.suffix == ".json" else list(csv.DictReader(text.splitlines()))
    except (Broken, csv.Error, RecipeError) as error:
        problems.append(OutputError(f"{file}: cannot be read: {error}"))
        return None
    found: dict[str, float] = {}
    for row in rows:
        first = next(iter(row), None)
        words = [f"{name} {value}" for name, value in row.items() if name and _number(value) is None and value]
        where = words[0] if words and first is not None else ""
        for name, value in row.items():
            number = _number(value)
            if number is not None and name:
                found[f"{where}: {name}" if where else name] = number
    return found


def _json_rows(value: Any) -> list[dict[str, Any]]:
    """A JSON file of scores: an object of numbers, a list of records, or an object of columns."""
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
    return number if isfinite(number) else None


def _hits(files: Sequence[Path], problems: list[PolymergeError]) -> tuple[dict[str, float], int]:
    """Whether each question was right, from the first table that says so, and how many requests for it failed."""
    for file in files:
        if not re.search(r"(_result|_auxmatch|_judge)\.(xlsx|tsv|json)$", file.name):
            continue
        complaints = Complaints(file)
        if file.suffix == ".json":
            try:
                rows = list(json_rows(json_of(text_of_file(file)), complaints))
            except (Broken, RecipeError) as error:
                problems.append(OutputError(f"{file}: {error}"))
                continue
        else:
            rows = list((tsv_rows if file.suffix == ".tsv" else sheet_rows)(complaints))
        problems += complaints.errors()
        marks = {str(fields.get("index")): _mark(fields) for _, fields in rows}
        if marks and all(mark is not None for mark in marks.values()):
            failed = sum(is_failure(str(fields.get("prediction", ""))) for _, fields in rows)
            return {name: mark for name, mark in marks.items() if mark is not None}, failed
    return {}, 0


def _mark(fields: Mapping[str, Any]) -> float | None:
    value = fields.get("hit", fields.get("score"))
    if isinstance(value, bool) or value in ("True", "False"):
        return float(value in (True, "True"))
    return _number(value)
