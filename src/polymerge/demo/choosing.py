"""Choose the weight without labels, as AdaMMS (CVPR 2025) does, and hold it against the best by labels."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from polymerge.inference.generation import Generation
from polymerge.inference.prompts import PromptSource
from polymerge.tuning.knobs import Knob
from polymerge.tuning.outcome import SearchResult
from polymerge.tuning.search import search
from polymerge.tuning.trials import Scoring

from .exam import LONGEST_ANSWER, Question

__all__ = ["choose_weight", "report_choice", "write_questions"]

PROMPTS = 100  # the paper's number
BATCH = 50


def choose_weight(
    recipe: Mapping[str, Any], exam: Sequence[Question], values: Sequence[float], out: Path
) -> SearchResult:
    """Search the second model's weight on questions of the exam; their answers are scored, but do not choose."""
    folder = out / "questions"
    folder.mkdir(parents=True, exist_ok=True)
    for number, question in enumerate(exam):
        Image.fromarray(question.picture).save(folder / f"{number}.png")
    file = write_questions(exam, range(len(exam)), folder / "questions.jsonl")
    return search(
        recipe,
        PromptSource(file, samples=PROMPTS),
        out / "search",
        vary=[Knob(values=tuple(map(float, values)))],
        keep_template_weight=True,
        scoring=Scoring("exact", choose=False),
        generation=Generation(max_new_tokens=LONGEST_ANSWER, batch_size=BATCH),
        force=True,
    )


def write_questions(exam: Sequence[Question], numbers: Iterable[int], file: Path) -> Path:
    """Write some questions of the exam; their pictures lie beside the file, each under its number in the exam."""
    lines = [
        {"question_id": number, "text": exam[number].prompt, "image": f"{number}.png", "answer": exam[number].answer}
        for number in numbers
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def report_choice(outcome: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], str]:
    """What the choice without labels costs against the best by labels, as data and as text.

    outcome  what search.json holds
    rows     the exam's results, of which those of the searched method have a weight
    """
    by_labels = {
        row["weight"]: sum(row[group]["value"] for group in ("perception", "unseen", "seen")) / 3
        for row in rows
        if row["method"] in ("none", "task_arithmetic")
    }
    scores = dict(zip(outcome["values"], outcome["scores"], strict=True))
    chosen = outcome["chosen"]
    best = max(outcome["candidates"], key=lambda weight: by_labels[weight])
    lines = [
        f"\nChoosing the weight without labels, as AdaMMS does: {outcome['prompts']} of the questions, without their",
        "answers; the weight is taken where the fewest answers differ from those of either neighbouring weight.",
        f"  {'weight':>6}{'answers that differ':>22}{'right, of these':>18}{'all questions, mean of the columns':>37}",
    ]
    for weight, differ in zip(outcome["candidates"], outcome["differences"], strict=True):
        marks = f"{'  <- chosen' if weight == chosen else ''}{'  <- best by labels' if weight == best else ''}"
        lines.append(f"  {weight:>6g}{differ:>22}{scores[weight]:>16.1f} %{100 * by_labels[weight]:>35.1f} %{marks}")
    lost = 100 * (by_labels[best] - by_labels[chosen])
    gained = 100 * (by_labels[chosen] - by_labels[0.0])
    lines.append(
        f"Chosen without labels: {chosen:g}, {gained:+.1f} points against the VLM as it was; best by labels: {best:g}, "
        f"{lost:.1f} points better."
    )
    data = {
        "chosen": chosen,
        "best by labels": best,
        "lost": lost / 100,
        "by labels": {f"{weight:g}": value for weight, value in by_labels.items()},
        "candidates": outcome["candidates"],
        "differences": outcome["differences"],
    }
    return data, "\n".join(lines)
