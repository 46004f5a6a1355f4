"""Score a file of predictions: soundly, and also as the benchmark's published scripts do.

The rules of the sound score, where the published scripts differ or crash:

- lines and questions are matched by question_id, read as text, never by position;
- the score is over all annotated questions, so a question without a line is wrong (`accuracy_over_answered` leaves
  those out); of several lines with one id the last counts; unknown ids and blank lines are ignored;
- a blank text is wrong whatever the answer, and so is null, which stands for a missing answer;
- a line that is not JSON, or lacks question_id or text, is refused with its number: it cannot be assigned to a
  question. All such lines are reported at once, together with problems of the annotations;
- a file without any line scores 0: every question is unanswered, as the notes report;
- captions are matched to images by name through the question file; images without a reference are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polymerge.errors import collecting
from polymerge.evaluation.mm_mergebench.annotations import Truth, answers_in, question_items, read_truth, truth_of
from polymerge.evaluation.mm_mergebench.published import Published, as_published
from polymerge.evaluation.mm_mergebench.tasks import task_named
from polymerge.evaluation.predictions import Predictions, at_most_shown, read_predictions
from polymerge.evaluation.scorers import SCORERS, Scored, scorer_named
from polymerge.evaluation.scorers.caption_metrics import (
    METRICS,
    NEEDS_JAVA,
    NOT_PTB,
    WITHOUT_JAVA,
    caption_metrics,
    has_java,
    plain_tokens,
)
from polymerge.paths import given_path

__all__ = ["TaskScore", "score_predictions", "score_questions"]


@dataclass(frozen=True)
class TaskScore:
    """The scores of a file of predictions.

    score              in percent, over all annotated questions; None, as right is, for captions without Java only
    as_published       the published script's output, in percent; None if it crashes or does not exist
    right, total       score times total / 100, a count if answers are right or wrong; number of annotated questions
    ids, samples       each question and its score in [0, 1], in the order of the annotations
    notes              oddities of the files, with file and line
    reason             why a number is None
    metrics            additional numbers: answered, accuracy_over_answered, the single caption metrics, ...
    published_metrics  additional numbers of the published script
    published_right    like right, and published_total like total: a script divides by its lines, not by the questions
    """

    task: str
    score: float | None
    as_published: float | None
    right: float | None
    total: int
    ids: tuple[str, ...]
    samples: tuple[float, ...] | None
    notes: tuple[str, ...] = ()
    reason: str | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    published_metrics: Mapping[str, float | None] = field(default_factory=dict)
    published_right: float | None = None
    published_total: int | None = None


def score_predictions(task: str, predictions_file: str | Path, annotations_folder: str | Path) -> TaskScore:
    """Score the predictions for one of the twelve tasks against the files in its annotation folder.

    Lines are matched by question_id, read as text; the last line of an id counts, ids that are not annotated are
    ignored, and a question without a line, or whose text is blank, null or a tool's message of a failure, is wrong.
    The notes report each of these.

    raises RecipeError for an unknown task, Refused with every problem of the files, MissingExtraError
    for captions without pycocoevalcap.
    """
    row = task_named(task)
    with collecting():
        predictions = read_predictions(given_path(predictions_file))
        truth = read_truth(row, given_path(annotations_folder))
    published = as_published(row, predictions, truth)
    texts = _texts(predictions, truth)
    if row.kind == "captions" and not has_java():
        return _captions_without_java(row.name, published, predictions, truth)
    scored = SCORERS[row.scorer].score(texts, truth.references)
    metrics: dict[str, float | None] = {}
    if row.kind != "captions":
        annotated = set(truth.ids)
        answered = sum(line.answer is not None and name in annotated for name, line in predictions.by_id().items())
        metrics |= {"answered": answered, "accuracy_over_answered": 100 * scored.right / answered if answered else None}
    if row.scorer in ("exact", "exact_lower"):
        metrics["normalised_accuracy"] = SCORERS["exact_normalised"].score(texts, truth.references).score
    if row.kind == "letter" and scored.samples is not None:
        shares = [share for share, item in zip(scored.samples, truth.items, strict=True) if item.fields.get("image")]
        metrics["image_accuracy"] = 100 * sum(shares) / len(shares) if shares else None
    return _task_score(row.name, scored, published, predictions, truth, metrics)


def score_questions(scorer: str, predictions_file: str | Path, questions_file: str | Path) -> TaskScore:
    """Score predictions against a question file in the LLaVA format, with the scorer of the given name.

    Each question holds `answer`, or `answers` as a list of texts (or of objects with an `answer` each).

    raises RecipeError for an unknown scorer, Refused with every problem of the files.
    """
    row = scorer_named(scorer)
    path = given_path(questions_file)
    with collecting():
        predictions = read_predictions(given_path(predictions_file))
        items = question_items(path)
        with at_most_shown(path):
            references: list[Any] = [answers_in(item) for item in items]
    if row.name == "box_iou":
        references = [", ".join(answers) for answers in references]
    truth = truth_of(items, references)
    scored = row.score(_texts(predictions, truth), truth.references)
    none = f"{row.name} is a scorer, not a task of the benchmark, and has no published script"
    return _task_score(row.name, scored, none, predictions, truth, {})


def _texts(predictions: Predictions, truth: Truth) -> list[str]:
    """The predicted text of each annotated question, empty if there is none."""
    by_id = predictions.by_id()
    return [(by_id[name].answer or "") if name in by_id else "" for name in truth.ids]


def _task_score(
    name: str,
    scored: Scored,
    published: Published | str,
    predictions: Predictions,
    truth: Truth,
    metrics: Mapping[str, float | None],
) -> TaskScore:
    known = published if isinstance(published, Published) else None
    return TaskScore(
        name,
        scored.score,
        known.score if known else None,
        scored.right,
        scored.total,
        truth.ids,
        scored.samples,
        (*predictions.notes(truth.ids), *truth.notes, *scored.notes),
        published if isinstance(published, str) else None,
        {**metrics, **scored.metrics},
        known.metrics if known else {},
        known.right if known else None,
        known.total if known else None,
    )


def _captions_without_java(name: str, published: Published | str, predictions: Predictions, truth: Truth) -> TaskScore:
    """The result without Java: no score, since the mean includes METEOR, but BLEU, ROUGE-L and CIDEr on plain
    tokens.
    """
    said = plain_tokens(_texts(predictions, truth))
    found = caption_metrics(said, [plain_tokens(texts) for texts in truth.references], WITHOUT_JAVA)
    notes = (*predictions.notes(truth.ids), *truth.notes, NOT_PTB)
    reason = NEEDS_JAVA if published == NEEDS_JAVA else f"score: {NEEDS_JAVA}; as published: {published}"
    metrics = {metric: 100 * found[metric].score if metric in found else None for metric in METRICS}
    return TaskScore(name, None, None, None, len(truth.ids), truth.ids, None, notes, reason, metrics)
