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
from pathlib import Path
from typing import Any

from polymerge.errors import PolymergeError, RecipeError
from polymerge.evaluation.harness.evaluator_files import FileNames, answer_in, finite_number, read_results
from polymerge.evaluation.harness.registered_classes import Wrapper
from polymerge.evaluation.harness.rows import AGAIN, Complaints, Documents, Row, documents, json_lines, kept
from polymerge.evaluation.results import TaskResult

__all__ = ["command", "log_rows", "place", "read", "read_answers"]

_NAMES = FileNames("lmms-eval", re.compile(r"(?P<stamp>.+)_results\.json"), "{stamp}_samples_{task}.jsonl")
_ENDS_AN_ARGUMENT = re.compile(r"[,=]")
_OF_EVERY_DOCUMENT = frozenset({"doc_id", "target", "doc", "arguments", "input", "resps", "filtered_resps", "doc_hash"})


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
        "--device", device, "--gen_kwargs", "temperature=0,do_sample=False", "--log_samples",
        "--output_path", str(out), *(["--trust_remote_code"] if trusted else []),
    )  # fmt: skip


def read(folder: Path, tasks: Sequence[str], before: set[Path]) -> tuple[dict[str, TaskResult], list[PolymergeError]]:
    """Read the results of the newest run below a folder; arguments and result are those of `read_results`."""
    return read_results(_NAMES, folder, tasks, before)


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


def read_answers(rows: Sequence[Row] | None, having: str | None, complaints: Complaints) -> Documents:
    """Read the documents of a log of lmms-eval or lm-eval, each with the response that was scored.

    rows  of a file from 2024; None reads the current format
    """
    chosen = kept(json_lines(complaints) if rows is None else rows, having, complaints)
    filters = list(dict.fromkeys(str(fields.get("filter")) for _, fields in chosen))  # lm-eval has a line for each
    chosen = [row for row in chosen if str(row[1].get("filter")) == filters[0]]
    several = 0

    def answer(row: Mapping[str, Any]) -> str:
        nonlocal several
        text, more = answer_in(row)
        several += more
        return text

    answers = documents(chosen, "doc_id", answer, complaints)
    notes = [f"documents with several responses, of which the first is read: {several}"] if several else []
    notes += [f"answers as the filter {filters[0]} finds them, not {', '.join(filters[1:])}"] if filters[1:] else []
    return Documents(answers, _score(chosen), tuple(f"{complaints.file}: {note}" for note in notes))


def _score(rows: Sequence[Row]) -> float | None:
    """Average the one metric that every document has; None if there is not exactly one."""
    metrics: dict[str, list[float]] = {}
    for _, fields in rows:
        for name in fields.keys() - _OF_EVERY_DOCUMENT:
            value = fields[name]
            value = value.get("score") if isinstance(value, dict) else value
            number = finite_number(value) if isinstance(value, int | float) else None
            if number is not None:
                metrics.setdefault(name, []).append(number)
    whole = [values for values in metrics.values() if len(values) == len(rows)]
    return math.fsum(whole[0]) / len(rows) if len(metrics) == len(whole) == 1 else None
