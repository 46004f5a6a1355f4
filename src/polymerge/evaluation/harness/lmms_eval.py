"""lmms-eval: its command line, and what it writes.

`OUT/<parent>__<folder>/<stamp>_results.json` holds {"results": {task: {"<metric>,<filter>": number}}}, and beside it
`<stamp>_samples_<task>.jsonl` a document a line with `doc_id` and each metric of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import fsum, isfinite
from pathlib import Path
from typing import Any

from polymerge.errors import OutputError, PolymergeError
from polymerge.evaluation.harness.registered_classes import Wrapper
from polymerge.evaluation.json_files import Broken, json_of, text_of_file
from polymerge.evaluation.logs.lmms_eval_logs import response
from polymerge.evaluation.logs.rows import Complaints, json_lines
from polymerge.evaluation.predictions import failures_note, is_failure
from polymerge.evaluation.results import TaskResult

__all__ = ["command", "read"]

_RESULTS = re.compile(r"(?P<stamp>.+)_results\.json")
_NO_METRIC = re.compile(r"stderr|^(alias|samples|name|sample_len|sample_count)$")


def command(
    row: Wrapper, folder: Path, tasks: Sequence[str], out: Path, device: str, batch_size: int, trusted: bool
) -> tuple[str, ...]:
    """What follows Python."""
    arguments = [f"{row.lmms_path}={folder}"]
    if row.placed:
        arguments.append(f"device_map={device}")
    return (
        "-m", "lmms_eval", "--model", row.lmms, *(["--force_simple"] if row.simple else []),
        "--model_args", ",".join(arguments), "--tasks", ",".join(tasks), "--batch_size", str(batch_size),
        "--device", device, "--log_samples", "--output_path", str(out), *(["--trust_remote_code"] if trusted else []),
    )  # fmt: skip


def read(
    folder: Path, tasks: Sequence[str], before: set[Path], problems: list[PolymergeError]
) -> Mapping[str, TaskResult]:
    """The results of the newest run below a folder, by task.

    tasks   as they were asked for; those that lmms-eval names so, or else all that it has numbers of
    before  files that were there before it ran
    """
    found = [path for path in folder.rglob("*_results.json") if path not in before and _RESULTS.fullmatch(path.name)]
    if not found:
        problems.append(OutputError(f"{folder}: lmms-eval wrote no results"))
        return {}
    file = max(found, key=lambda path: path.name)
    try:
        value = json_of(text_of_file(file))
    except Broken as error:
        problems.append(OutputError(f"{file}: {error}"))
        return {}
    every = value.get("results") if isinstance(value, dict) else None
    counts = value.get("n-samples") if isinstance(value, dict) else None
    if not isinstance(every, dict) or not every:
        problems.append(OutputError(f"{file}: has no 'results' by task"))
        return {}
    named = [task for task in tasks if task in every] or list(every)
    stamp = file.name.removesuffix("_results.json")
    results = {}
    for task in named:
        metrics = _metrics(every[task])
        if metrics:
            results[task] = _task(
                metrics, file.with_name(f"{stamp}_samples_{task}.jsonl"), _count(counts, task), problems
            )
    if not results:
        problems.append(OutputError(f"{file}: not one number is there for {', '.join(named)}"))
    return results


def _metrics(value: Any) -> dict[str, float]:
    """The numbers of a task by name, without their errors; the usual filter is left out of the name."""
    return {
        str(name).removesuffix(",none"): float(number)
        for name, number in (value.items() if isinstance(value, dict) else ())
        if not _NO_METRIC.search(name.partition(",")[0]) and _is_number(number)
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _count(counts: Any, task: str) -> int:
    value = counts.get(task) if isinstance(counts, dict) else None
    number = value.get("effective") if isinstance(value, dict) else None
    return number if isinstance(number, int) else 0


def _task(metrics: Mapping[str, float], file: Path, count: int, problems: list[PolymergeError]) -> TaskResult:
    """The first number is the score. It is one in percent where it is the mean of shares of single documents."""
    name, score = next(iter(metrics.items()))
    samples, failed = _samples(file, name.partition(",")[0], problems) if file.is_file() else ({}, 0)
    notes = [f"the score is {name}, the first of {', '.join(metrics)}"] if len(metrics) > 1 else []
    if failed:
        notes.append(failures_note(failed))
    mean = fsum(samples.values()) / len(samples) if samples else None
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


def _samples(file: Path, metric: str, problems: list[PolymergeError]) -> tuple[dict[str, float], int]:
    """A metric of each document, none where not every document has it as a number; and how many requests failed."""
    complaints = Complaints(file)
    found: dict[str, float] = {}
    whole, failed = True, 0
    for place, fields in json_lines(complaints):
        value, name = fields.get(metric), str(fields.get("doc_id"))
        with suppress(ValueError):  # no text, such as a log-likelihood
            failed += is_failure(response(fields)[0])
        value = value.get("score") if isinstance(value, dict) else value
        if name in found:
            complaints.add("the same 'doc_id' twice", place, "Did two runs write into one file?")
        elif _is_number(value) or isinstance(value, bool):
            found[name] = float(value)  # type: ignore[arg-type]
        else:
            whole = False
    problems += complaints.errors()
    return (found if whole else {}), failed
