"""What follows the merges: the choice of the weight without labels, one page that shows it all, and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from polymerge.analysis.knockout import knockout
from polymerge.analysis.overlap import overlap
from polymerge.charts import Series, draw, line_chart
from polymerge.demo.digit_questions import LONGEST_ANSWER, Question
from polymerge.durable import make_folder, write_file
from polymerge.evaluation.comparison import compare_files
from polymerge.evaluation.comparison_text import plain_text
from polymerge.evaluation.evaluating import evaluate
from polymerge.inference.generation import Generation
from polymerge.inference.prompts import PromptSource
from polymerge.reporting.reports import report
from polymerge.tuning.knobs import Knob
from polymerge.tuning.outcome import SearchResult
from polymerge.tuning.search import SearchOptions, search
from polymerge.tuning.trials import Scoring

if TYPE_CHECKING:
    import altair as alt

__all__ = ["choose_weight", "draw_accuracy", "make_page", "report_choice", "write_questions"]

SEARCH_PROMPTS = 100  # the paper's number
SEARCH_BATCH = 50
TASKS = ("perception", "unseen")
ASKED = 400  # of each task, before and after
KNOCKED_OUT = 60  # of each task, in each of the many models without a module
DRAWN = {"perception": "perception", "seen": "arithmetic, seen pairs", "unseen": "arithmetic, unseen pairs"}
DELTAS = {"task_arithmetic": "reasoning delta", "random": "random delta"}
GENERATION = Generation(max_new_tokens=LONGEST_ANSWER, batch_size=100)


def choose_weight(
    recipe: Mapping[str, Any], questions: Sequence[Question], values: Sequence[float], out: Path
) -> SearchResult:
    """Search the second model's weight without labels, as AdaMMS (CVPR 2025) does; scores do not choose."""
    file = write_questions(questions, out / "questions")
    return search(
        recipe,
        PromptSource(file, samples=SEARCH_PROMPTS),
        out / "search",
        SearchOptions(
            vary=[Knob(values=tuple(map(float, values)))],
            keep_template_weight=True,
            scoring=Scoring("exact", choose=False),
            generation=Generation(max_new_tokens=LONGEST_ANSWER, batch_size=SEARCH_BATCH),
            force=True,
        ),
    )


def report_choice(outcome: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], str]:
    """What the choice without labels costs against the best by labels, as data and as text.

    outcome  what search.json holds
    rows     results on all questions, of which those of the searched method have a weight
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


def make_page(
    vlm: Path, merged: Path, recipe: Mapping[str, Any], questions: Sequence[Question], searched: Path, out: Path
) -> tuple[Path, str]:
    """Evaluate and knock out the merged model beside the VLM as it was; the page of it all, and what to print.

    merged   made of `recipe` with the weight that the search chose
    searched the folder of that search, beside which the questions' pictures lie
    """
    files = {task: _some(questions, task, out / "questions") for task in TASKS}
    found = overlap(recipe)
    found.save(out / "overlap.json")
    scored = {}
    for name, model in (("VLM", vlm), ("merged", merged)):
        tasks = [f"{file}:exact" for file in files.values()]
        folder = out / "scores" / name
        evaluate(
            str(model), tasks, folder, name=name, max_new_tokens=LONGEST_ANSWER, generation=GENERATION, force=True
        )  # fmt: skip
        scored[name] = folder
    compared = compare_files([folder / "results.json" for folder in scored.values()], template="VLM")
    knocked_out = knockout(
        merged, files, out / "knockout",
        scorer="exact", against=vlm, samples=KNOCKED_OUT, generation=GENERATION, force=True,
    )  # fmt: skip
    runs = [merged, searched, out / "overlap.json", *scored.values(), knocked_out.folder]
    made = report(runs, out / "report.html", "The demo of polymerge")
    return made.page, plain_text(compared)


def write_questions(questions: Sequence[Question], folder: Path) -> Path:
    """Write questions to questions.jsonl in a folder, with their pictures beside it, and return the file."""
    make_folder(folder)
    for number, question in enumerate(questions):
        Image.fromarray(question.picture).save(folder / f"{number}.png")
    return _write(questions, range(len(questions)), folder / "questions.jsonl")


def _some(questions: Sequence[Question], group: str, folder: Path) -> Path:
    """Some questions of one group, spread over it, as a file beside their pictures."""
    own = [number for number, question in enumerate(questions) if question.group == group]
    return _write(questions, own[:: max(1, len(own) // ASKED)][:ASKED], folder / f"{group}.jsonl")


def _write(questions: Sequence[Question], numbers: Iterable[int], file: Path) -> Path:
    """Write some of the questions to a file; their pictures lie beside it, each under the number of its question."""
    lines = [
        {
            "question_id": number,
            "text": questions[number].prompt,
            "image": f"{number}.png",
            "answer": questions[number].answer,
        }
        for number in numbers
    ]
    return write_file(file, "".join(json.dumps(line) + "\n" for line in lines))


def draw_accuracy(results: dict[str, Any], stem: Path) -> None:
    """Draw each group's accuracy, for the reasoning delta and for the random one, as STEM.png and STEM.svg."""
    draw(lambda: [_chart(results)], stem)


def _chart(results: dict[str, Any]) -> alt.LayerChart:
    rows = {(row["method"], row["weight"]): row for row in results["rows"]}
    weights = sorted({weight for _, weight in rows})
    series = {}
    for group, label in DRAWN.items():
        for method, delta in DELTAS.items():
            own = [rows.get((method, weight), rows.get(("none", weight))) for weight in weights]
            value, error = (
                [None if row is None else 100.0 * row[group][name] for row in own] for name in ("value", "error")
            )
            pairs = list(zip(value, error, strict=True))
            low = [None if one is None or off is None else one - off for one, off in pairs]
            high = [None if one is None or off is None else one + off for one, off in pairs]
            series[f"{label}: {delta}"] = Series(value, low, high)
    return line_chart(
        "What the merged model answers", ("weight of the delta added to the VLM's text tower", weights),
        "right answers about held-out pictures, %", series, about="the shade is one standard error either way",
    )  # fmt: skip
