"""The end of the story as one page: the merge, the choice of its weight, scores, and what each layer contributes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polymerge.analysis.knockout import knockout
from polymerge.analysis.overlap import overlap
from polymerge.evaluation.comparison import compare_files
from polymerge.evaluation.comparison_text import plain_text
from polymerge.evaluation.evaluate import evaluate
from polymerge.inference.generation import Generation
from polymerge.reporting.report import report

from .choosing import write_questions
from .exam import LONGEST_ANSWER, Question

__all__ = ["make_page"]

TASKS = ("perception", "unseen")
ASKED = 400  # of each task, before and after
KNOCKED_OUT = 60  # of each task, in each of the many models without a module
GENERATION = Generation(max_new_tokens=LONGEST_ANSWER, batch_size=100)


def make_page(
    vlm: Path, merged: Path, recipe: Mapping[str, Any], exam: Sequence[Question], search: Path, out: Path
) -> tuple[Path, str]:
    """Evaluate and knock out the merged model beside the VLM as it was; the page of it all, and what to print.

    merged   made of `recipe` with the weight that the search chose
    search   the folder of that search, beside which the exam's pictures lie
    """
    questions = [_questions(exam, task, out / "questions") for task in TASKS]
    found = overlap(recipe)
    (out / "overlap.json").write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
    scored = {}
    for name, model in (("VLM", vlm), ("merged", merged)):
        tasks = [f"{file}:exact" for file in questions]
        folder = out / "scores" / name
        evaluate(
            str(model), tasks, folder, name=name, max_new_tokens=LONGEST_ANSWER, generation=GENERATION, force=True
        )  # fmt: skip
        scored[name] = folder
    compared = compare_files([folder / "results.json" for folder in scored.values()], template="VLM")
    knocked_out = knockout(
        merged, [f"{task}={file}" for task, file in zip(TASKS, questions, strict=True)], out / "knockout",
        scorer="exact", against=vlm, samples=KNOCKED_OUT, generation=GENERATION, force=True,
    )  # fmt: skip
    runs = [merged, search, out / "overlap.json", *scored.values(), knocked_out.folder]
    made = report(runs, out / "report.html", "The demo of polymerge")
    return made.page, plain_text(compared)


def _questions(exam: Sequence[Question], group: str, folder: Path) -> Path:
    """Some questions of one group, spread over it, as a file beside the exam's pictures."""
    own = [number for number, question in enumerate(exam) if question.group == group]
    return write_questions(exam, own[:: max(1, len(own) // ASKED)][:ASKED], folder / f"{group}.jsonl")
