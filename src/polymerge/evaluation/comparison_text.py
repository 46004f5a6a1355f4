"""Format a comparison as text, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from polymerge.charts import draw
from polymerge.durable import make_folder, write_file
from polymerge.evaluation.comparison import Comparison
from polymerge.evaluation.gains import Gain
from polymerge.evaluation.results import Results
from polymerge.tables import aligned

__all__ = ["describe_results", "gains_csv", "markdown", "plain_text", "scores_csv", "write_comparison"]

_NONE = "-"
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What a cell begins with that is computed, in both widths."""


def plain_text(compared: Comparison) -> str:
    """Format the tables in columns for a terminal."""
    blocks = []
    for title, rows in _tables(compared):
        blocks.append("\n".join([title, *aligned(rows)]))
    return "\n\n".join([*blocks, *_notes(compared)])


def markdown(compared: Comparison) -> str:
    """Format the tables as Markdown."""
    blocks = []
    for title, (head, *rows) in _tables(compared):
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
        escaped = [" | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) for line in lines]
        blocks.append("\n".join([f"### {title[0].upper()}{title[1:]}", "", *(f"| {line} |" for line in escaped)]))
    return "\n\n".join([*blocks, *_notes(compared)]) + "\n"


def scores_csv(compared: Comparison) -> str:
    """One row per model, one column per task and average; missing scores are empty cells."""
    rows: list[list[str | float | None]] = [
        ["model", *(column.name for column in compared.columns)],
        *([model, *(compared.scores[model, column.name] for column in compared.columns)] for model in compared.models),
    ]
    return _csv(rows)


def gains_csv(compared: Comparison) -> str:
    """One row per gain, with its interval."""
    head = ["model", "column", "over", "gain", "low", "high", "within_noise", "rough", "reason"]
    rows = [
        [
            gain.model, gain.column, " + ".join(gain.over), gain.value, gain.low, gain.high,
            "" if gain.within_noise is None else str(gain.within_noise).lower(), str(gain.rough).lower(),
            gain.reason or "",
        ]
        for gain in compared.gains
    ]  # fmt: skip
    return _csv([head, *rows])


def write_comparison(compared: Comparison, folder: Path) -> list[Path]:
    """Write compare.md, compare.csv, gains.csv if there are gains, compare.png and compare.svg; returns the files."""
    texts = {"compare.md": markdown(compared), "compare.csv": scores_csv(compared)}
    if compared.gains:
        texts["gains.csv"] = gains_csv(compared)
    make_folder(folder)
    pictures = draw(compared.charts, folder / "compare")
    for name, text in texts.items():
        write_file(folder / name, text)
    return [*(folder / name for name in texts), *pictures]


def describe_results(results: Results) -> str:
    """Format one model's results in columns, followed by notes."""
    head = ["task", "score", "as published", "right", "of", "failed"]
    rows = [head]
    notes = []
    for name, task in results.tasks.items():
        whole = task.right is not None and float(task.right).is_integer()
        differs = task.as_published is not None and _two(task.as_published) != _two(task.score)
        rows.append(
            [
                name, _two(task.score), _two(task.as_published) if differs else "",
                f"{task.right:.0f}" if whole else "", str(task.total), str(task.failed) if task.failed else "",
            ]
        )  # fmt: skip
        notes += [f"{name}: {task.reason}"] if task.reason and task.score is None else []
        notes += [f"{name}: {note}" for note in task.notes]
        if task.failed:
            notes.append(f"{name}: {task.failed} of {task.total} have no answer and count as wrong; see errors.jsonl")
    return "\n".join([results.name, *aligned(rows), *(f"note: {note}" for note in notes)])


def _tables(compared: Comparison) -> Iterator[tuple[str, list[list[str]]]]:
    names = [column.name for column in compared.columns]
    rows = [[model, *(_two(compared.scores[model, name]) for name in names)] for model in compared.models]
    yield "scores as published" if compared.published else "scores", [["model", *names], *rows]
    for over in dict.fromkeys(gain.over for gain in compared.gains):
        gains = {(gain.model, gain.column): gain for gain in compared.gains if gain.over == over}
        models = [model for model in compared.models if any(key[0] == model for key in gains)]
        rows = [[name, *(_gain(gains.get((model, name))) for model in models)] for name in names]
        title = f"gain over the mean of {', '.join(over)}" if len(over) > 1 else f"gain over {over[0]}"
        yield title, [["task", *models], *rows]


def _gain(gain: Gain | None) -> str:
    if gain is None:
        return _NONE
    if gain.low is None or gain.high is None:
        return f"{gain.value:+.2f}"
    noise = ", within noise" if gain.within_noise else ""
    return f"{gain.value:+.2f} {'~' if gain.rough else ''}[{gain.low:+.2f}, {gain.high:+.2f}]{noise}"


def _notes(compared: Comparison) -> list[str]:
    lines = []
    if any(gain.low is not None for gain in compared.gains):
        lines.append(
            f"Intervals: 95 %, paired bootstrap over questions, {compared.settings['resamples']:.0f} resamples, seed "
            f"{compared.settings['seed']:.0f}. A gain whose interval holds zero is within noise."
        )
    if any(gain.rough for gain in compared.gains):
        lines.append(
            "~ The score is one of the whole set of captions; the interval has the width of that of the mean over them."
        )
    reasons = dict.fromkeys(gain.reason for gain in compared.gains if gain.reason)
    lines += [f"No interval: {reason}." for reason in reasons]
    lines += [f"Note: {note}." for note in compared.notes]
    return ["\n".join(lines)] if lines else []


def _two(score: float | None) -> str:
    return _NONE if score is None else f"{score:.2f}"


def _csv(rows: Iterable[Sequence[str | float | None]]) -> str:
    """A table for spreadsheets, in which no text is a formula, whatever models and tasks are called."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_cell(cell) for cell in row] for row in rows)
    return text.getvalue()


def _cell(value: str | float | None) -> str:
    """A cell: a number as it is, and a text that a spreadsheet would compute behind an apostrophe, as OWASP advises."""
    if value is None:
        return ""
    if isinstance(value, str):
        line = value.replace("\r", " ")  # which the csv module writes without quotes
        return f"'{line}" if value.startswith(_FORMULA) else line
    return f"{value:.6g}"
