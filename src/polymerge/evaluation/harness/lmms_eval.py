"""lmms-eval: its command line, and its output.

`OUT/<parent>__<folder>/<stamp>_results.json` holds {"results": {task: {"<metric>,<filter>": number}}}, and beside it
`<stamp>_samples_<task>.jsonl` (with `--log_samples`) a document a line with `doc_id`, each metric of it, and what was
answered: `filtered_resps` is scored, which is `resps` without a model's thoughts, or what a filter found in it.
`resps` is left out if it says no more, and what holds one response may be that response instead of a list. In 2024,
`<task>.json` held the documents: {"logs": [{"doc_id": 0, "resps": [["yes"]], "filtered_resps": ["yes"], ...}]}.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from polymerge.checkpoints.bounds import RECORDS_BYTES
from polymerge.checkpoints.discovery import is_plain
from polymerge.checkpoints.json_objects import read_json
from polymerge.errors import OutputError, PolymergeError, RecipeError
from polymerge.evaluation.harness.registered_classes import Wrapper
from polymerge.evaluation.harness.rows import AGAIN, Complaints, Documents, Row, documents, json_lines, kept
from polymerge.evaluation.predictions import failures_note, is_failure
from polymerge.evaluation.results import TaskResult

__all__ = ["command", "log_rows", "place", "read", "read_answers"]

_RUN = "Run lmms-eval again."
_RESULTS = re.compile(r"(?P<stamp>.+)_results\.json")
_ENDS_AN_ARGUMENT = re.compile(r"[,=]")
_OF_EVERY_DOCUMENT = frozenset({"doc_id", "target", "doc", "arguments", "input", "resps", "filtered_resps", "doc_hash"})
_NO_METRIC = re.compile(r"stderr|^(alias|samples|name|sample_len|sample_count)$")


class _Results(msgspec.Struct):
    """The members of a results file that are read."""

    results: dict[str, dict[str, Any]]
    samples: dict[str, dict[str, Any]] = msgspec.field(name="n-samples", default_factory=dict)
    groups: dict[str, list[str]] = msgspec.field(name="group_subtasks", default_factory=dict)


def place(row: Wrapper, folder: Path, links: Path) -> Path:
    """A path to the checkpoint that can be one of lmms-eval's arguments and has what the model's code reads off it: its
    own, or a link to it.

    raises RecipeError if that of the link cannot be one, either.
    """
    name = _ENDS_AN_ARGUMENT.sub("-", folder.name).strip() or "model"
    if row.named not in name.lower():
        name = f"{row.named}-{name}"
    found = folder if folder.name == name and str(folder) == str(folder).strip() else links / name
    if _ENDS_AN_ARGUMENT.search(str(found)):
        found = links / name
    if _ENDS_AN_ARGUMENT.search(str(found)):
        raise RecipeError(f"{found}: for lmms-eval a path ends at a comma or an equals sign. Name another `out`")
    return found


def command(
    row: Wrapper, folder: Path, tasks: Sequence[str], out: Path, device: str, batch_size: int, trusted: bool
) -> tuple[str, ...]:
    """Arguments of the Python executable; raises RecipeError for a device that would be several arguments."""
    arguments = [f"{row.lmms_path}={folder}"]
    if _ENDS_AN_ARGUMENT.search(device):
        raise RecipeError(f"device: '{device}' is no device such as cpu, cuda or cuda:1")
    if row.placed:
        arguments.append(f"device_map={device}")
    return (
        "-m", "lmms_eval", "--model", row.lmms, *(["--force_simple"] if row.simple else []),
        "--model_args", ",".join(arguments), "--tasks", ",".join(tasks), "--batch_size", str(batch_size),
        "--device", device, "--gen_kwargs", "temperature=0", "--log_samples",
        "--output_path", str(out), *(["--trust_remote_code"] if trusted else []),
    )  # fmt: skip


def read(folder: Path, tasks: Sequence[str], before: set[Path]) -> tuple[dict[str, TaskResult], list[PolymergeError]]:
    """Read the results of the newest run below a folder, by task, and what is wrong with missing or broken files.

    tasks   as requested: lmms-eval's tasks of these names, or all that it has numbers for if one is a group of others
    before  files that existed before it ran
    """
    found = [path for path in folder.rglob("*_results.json") if path not in before and _RESULTS.fullmatch(path.name)]
    if not found:
        return {}, [OutputError(f"{folder}: lmms-eval wrote no results")]
    file = max(found, key=lambda path: path.name)
    try:
        said = read_json(file, _Results, unique_keys=False, most=RECORDS_BYTES, error=OutputError, then=_RUN)
    except PolymergeError as error:
        return {}, list(error.problems)
    stamp = file.name.removesuffix("_results.json")
    results: dict[str, TaskResult] = {}
    wrong: list[PolymergeError] = []
    for task in tasks if set(tasks) <= set(said.results) else said.results:
        metrics = _metrics(said.results[task])
        count = said.samples.get(task, {}).get("effective")
        name = f"{stamp}_samples_{task}.jsonl"
        samples = file.with_name(name) if is_plain(name) and "/" not in name else None
        if metrics:
            try:
                results[task] = _task(metrics, samples, count if isinstance(count, int) else 0)
            except PolymergeError as error:
                wrong += error.problems
    numbered = [name for name, value in said.results.items() if _metrics(value)]
    for task in tasks:
        # the numbers of a group can be those of its tasks alone
        if not any(name.startswith(task) or name in said.groups.get(task, ()) for name in numbered):
            wrong.append(OutputError(f"{file}: not one number is there for {task}"))
    return results, wrong


def _metrics(value: Mapping[str, Any]) -> dict[str, float]:
    """A task's numbers by name, without standard errors; the default filter is dropped from the names."""
    return {
        str(name).removesuffix(",none"): float(number)
        for name, number in value.items()
        if not _NO_METRIC.search(name.partition(",")[0]) and _is_number(number)
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _task(metrics: Mapping[str, float], file: Path | None, count: int) -> TaskResult:
    """Take the first number as the score: in percent if it is the mean of the documents' shares."""
    name, score = next(iter(metrics.items()))
    samples, failed = _samples(file, name.partition(",")[0]) if file is not None and file.is_file() else ({}, 0)
    notes = [f"the score is {name}, the first of {', '.join(metrics)}"] if len(metrics) > 1 else []
    if failed:
        notes.append(failures_note(failed))
    mean = math.fsum(samples.values()) / len(samples) if samples else None
    if mean is not None and abs(mean - score) < 1e-6 and all(0 <= share <= 1 for share in samples.values()):
        return TaskResult(
            100 * score, right=score * len(samples), total=len(samples), failed=failed, samples=samples,
            metrics=metrics, notes=tuple(notes), settings={"scorer": name},
        )  # fmt: skip
    if samples:
        notes.append("the score is no mean over the documents, so their marks are left out")
    return TaskResult(
        score, "points", total=len(samples) or count, failed=failed, metrics=metrics, notes=tuple(notes),
        settings={"scorer": name},
    )  # fmt: skip


def _samples(file: Path, metric: str) -> tuple[dict[str, float], int]:
    """Read a metric of each document, empty if any document lacks it as a number; and count failed requests."""
    complaints = Complaints(file)
    found: dict[str, float] = {}
    whole, failed = True, 0
    for place, fields in json_lines(complaints):
        value, name = fields.get(metric), str(fields.get("doc_id"))
        with suppress(ValueError):  # no text, such as a log-likelihood
            failed += is_failure(_response(fields)[0])
        value = value.get("score") if isinstance(value, dict) else value
        if name in found:
            complaints.add("the same 'doc_id' twice", place, "Did two runs write into one file?")
        elif _is_number(value) or isinstance(value, bool):
            found[name] = float(value)  # type: ignore[arg-type]
        else:
            whole = False
    complaints.refuse()
    return (found if whole else {}), failed


# answers


def log_rows(value: Mapping[str, Any], complaints: Complaints) -> list[Row]:
    """The documents of a log file of 2024."""
    logs = value.get("logs")
    if not isinstance(logs, list):
        complaints.add("'logs' is no list", "", AGAIN)
        return []
    rows = [(f"logs[{place}]", entry) for place, entry in enumerate(logs)]
    for place, entry in rows:
        if not isinstance(entry, dict):
            complaints.add("no JSON object", place, AGAIN)
    return [row for row in rows if isinstance(row[1], dict)]


def read_answers(rows: Sequence[Row] | None, keep: str | None, complaints: Complaints) -> Documents:
    """Read the documents of a log, each with the response that was scored.

    rows  of a file from 2024; None reads the current format
    """
    chosen = kept(json_lines(complaints) if rows is None else rows, keep, complaints)
    several = 0

    def answer(row: Mapping[str, Any]) -> str:
        nonlocal several
        text, more = _response(row)
        several += more
        return text

    answers = documents(chosen, "doc_id", answer, complaints)
    notes = (
        (f"{complaints.file}: documents with several responses, of which the first is read: {several}",)
        if several
        else ()
    )
    return Documents(answers, _score(chosen), notes)


def _response(row: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the response that was scored, and whether it is the first of several.

    raises ValueError with the reason if there is none.
    """
    field = next((name for name in ("filtered_resps", "resps") if row.get(name) is not None), None)
    if field is None:
        raise ValueError("no response")
    return _first(row[field], field)


def _first(value: Any, field: str) -> tuple[str, bool]:
    """Return the first response, and whether there are more."""
    more = False
    while isinstance(value, list):
        if len(value) == 2 and value[1] in (True, False, "True", "False") and _real(value[0]) is not None:
            raise ValueError(f"a log-likelihood instead of a response in '{field}'")
        if not value:
            raise ValueError(f"an empty list in '{field}'")
        more = more or len(value) > 1
        value = value[0]
    if not isinstance(value, str):
        raise ValueError(f"no text in '{field}' but {_kind(value)}")
    return value, more


def _real(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _kind(value: Any) -> str:
    return {type(None): "null", bool: "true or false", dict: "an object"}.get(type(value), "a number")


def _score(rows: Sequence[Row]) -> float | None:
    """Average the one metric that every document has; None if there is not exactly one."""
    metrics: dict[str, list[float]] = {}
    for _, fields in rows:
        for name in fields.keys() - _OF_EVERY_DOCUMENT:
            value = fields[name]
            value = value.get("score") if isinstance(value, dict) else value
            number = _real(value) if isinstance(value, int | float) else None
            if number is not None:
                metrics.setdefault(name, []).append(number)
    whole = [values for values in metrics.values() if len(values) == len(rows)]
    return math.fsum(whole[0]) / len(rows) if len(metrics) == len(whole) == 1 else None
