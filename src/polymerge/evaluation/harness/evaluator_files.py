"""The files of results that lm-evaluation-harness writes, and lmms-eval, which has them from there.

A file of results holds {"results": {task: {"<metric>,<filter>": number}}}, and one of samples a document of a task in
each line, with `doc_id`, each metric of it, and what was answered: `filtered_resps` is scored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from polymerge.checkpoints.bounds import RECORDS_BYTES
from polymerge.checkpoints.discovery import is_plain
from polymerge.checkpoints.json_objects import read_json
from polymerge.errors import OutputError, PolymergeError
from polymerge.evaluation.harness.rows import Complaints, json_lines
from polymerge.evaluation.predictions import failures_note, is_failure
from polymerge.evaluation.results import TaskResult

__all__ = ["FileNames", "answer_in", "finite_number", "read_results", "response_in"]

_LOWER = "lower is better"
_NO_METRIC = re.compile(r"stderr|^(alias|samples|name|sample_len|sample_count)$")


class FileNames(NamedTuple):
    """How a tool names its files.

    tool     what messages call it
    results  its file of results, with a group `stamp`
    samples  that of a task's samples, with fields for `stamp` and `task`
    """

    tool: str
    results: re.Pattern[str]
    samples: str


class _Results(msgspec.Struct):
    """The members of a results file that are read."""

    results: dict[str, dict[str, Any]]
    samples: dict[str, dict[str, Any]] = msgspec.field(name="n-samples", default_factory=dict)
    groups: dict[str, list[str]] = msgspec.field(name="group_subtasks", default_factory=dict)
    higher_is_better: dict[str, dict[str, Any]] = {}


def read_results(
    named: FileNames, folder: Path, tasks: Sequence[str], before: set[Path]
) -> tuple[dict[str, TaskResult], list[PolymergeError]]:
    """Read the results of the newest run below a folder, by task, and what is wrong with missing or broken files.

    tasks   as requested: the tool's tasks of these names, or all that it has numbers for if one is a group of others
    before  files that existed before it ran
    """
    found = {path: match for path in folder.rglob("*.json") if (match := named.results.fullmatch(path.name))}
    new = [path for path in found if path not in before]
    if not new:
        return {}, [OutputError(f"{folder}: {named.tool} wrote no results")]
    file = max(new, key=lambda path: path.name)
    then = f"Run {named.tool} again."
    try:
        said = read_json(file, _Results, unique_keys=False, most=RECORDS_BYTES, error=OutputError, then=then)
    except PolymergeError as error:
        return {}, list(error.problems)
    results: dict[str, TaskResult] = {}
    wrong: list[PolymergeError] = []
    for task in tasks if set(tasks) <= set(said.results) else said.results:
        metrics = _metrics(said.results[task])
        count = said.samples.get(task, {}).get("effective")
        name = named.samples.format(stamp=found[file]["stamp"], task=task)
        samples = file.with_name(name) if is_plain(name) and "/" not in name else None
        if metrics:
            try:
                result = _task(metrics, samples, count if isinstance(count, int) else 0)
                lower = said.higher_is_better.get(task, {}).get(next(iter(metrics)).partition(",")[0]) is False
                results[task] = msgspec.structs.replace(result, notes=(*result.notes, _LOWER)) if lower else result
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
    samples, failed = _samples(file, *name.partition(",")[::2]) if file is not None and file.is_file() else ({}, 0)
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


def _samples(file: Path, metric: str, found_by: str) -> tuple[dict[str, float], int]:
    """Read a metric of each document, empty if any document lacks it as a number; and count failed requests.

    found_by  the filter by which the answer was found; empty for the default one, `none`
    """
    complaints = Complaints(file)
    found: dict[str, float] = {}
    whole, failed = True, 0
    for place, fields in json_lines(complaints):
        if fields.get("filter", found_by or "none") != (found_by or "none"):
            continue  # lm-eval has a line for each filter
        value, name = fields.get(metric), str(fields.get("doc_id"))
        with suppress(ValueError):  # no text, such as a log-likelihood
            failed += is_failure(response_in(fields)[0])
        value = value.get("score") if isinstance(value, dict) else value
        if name in found:
            complaints.add("the same 'doc_id' twice", place, "Did two runs write into one file?")
        elif _is_number(value) or isinstance(value, bool):
            found[name] = float(value)  # type: ignore[arg-type]
        else:
            whole = False
    complaints.refuse()
    return (found if whole else {}), failed


def response_in(row: Mapping[str, Any]) -> tuple[str, bool]:
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
        if len(value) == 2 and value[1] in (True, False, "True", "False") and finite_number(value[0]) is not None:
            raise ValueError(f"a log-likelihood instead of a response in '{field}'")
        if not value:
            raise ValueError(f"an empty list in '{field}'")
        more = more or len(value) > 1
        value = value[0]
    if not isinstance(value, str):
        raise ValueError(f"no text in '{field}' but {_kind(value)}")
    return value, more


def answer_in(row: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the answer that was scored, as `response_in`; where log-likelihoods were, the choice with the largest.

    That is its text, or its number where the choices are what the text goes on from.

    raises ValueError with the reason if there is none.
    """
    try:
        return response_in(row)
    except ValueError:
        if (chosen := _choice(row)) is None:
            raise
        return chosen, False


def _choice(row: Mapping[str, Any]) -> str | None:
    """The choice that lm-eval holds for the most probable; None if the row does not say what was chosen from."""
    asked, told = row.get("arguments"), row.get("filtered_resps")
    if not isinstance(asked, dict) or not isinstance(told, list) or len(asked) != len(told) or len(told) < 2:
        return None
    numbers = [finite_number(one[0]) if isinstance(one, list) and len(one) == 2 else None for one in told]
    pairs = [(one.get("arg_0"), one.get("arg_1")) for one in asked.values() if isinstance(one, dict)]
    likely = [number for number in numbers if number is not None]
    if len(likely) < len(told) or len(pairs) < len(told):
        return None
    best = likely.index(max(likely))
    before, after = ({pair[place] for pair in pairs} for place in (0, 1))
    if len(before) == 1 and len(after) == len(pairs):
        return str(pairs[best][1]).strip()
    return str(best) if len(after) == 1 else None


def finite_number(value: Any) -> float | None:
    """The number that a value is or spells; None if it does neither."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _kind(value: Any) -> str:
    return {type(None): "null", bool: "true or false", dict: "an object"}.get(type(value), "a number")
