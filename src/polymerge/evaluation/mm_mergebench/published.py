"""The published scorers of MM-MergeBench, defects included, for numbers comparable to the paper's.

Answers should not be scored like this; the sound scorers are in `scorers`. Each function processes the
lines as the script of that name does, and returns the reason if the script would crash.
Common to all: a blank line stops the script, the score is over the lines and not over the questions (but for
ScienceQA), a duplicate line counts twice. The caption scripts also build SPICE, which downloads a parser, and
omit it from their output; it is not run here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from polymerge.evaluation.mm_mergebench.annotations import Item, Truth
from polymerge.evaluation.mm_mergebench.tasks import Task
from polymerge.evaluation.predictions import Line, Predictions
from polymerge.evaluation.scorers.answers import parsed_box, parsed_letter
from polymerge.evaluation.scorers.caption_metrics import (
    NEEDS_JAVA,
    caption_metrics,
    has_java,
    mean_metric,
    ptb_lines,
    without_punctuation,
)

__all__ = ["Published", "as_published"]


@dataclass(frozen=True)
class Published:
    """The output of a script: its score in percent, and its other numbers."""

    score: float
    right: float
    total: int
    metrics: Mapping[str, float | None] = field(default_factory=dict)


def as_published(task: Task, predictions: Predictions, truth: Truth) -> Published | str:
    """Score as the task's published script does; returns its numbers, or why it stops."""
    if predictions.blank:
        where = f"{predictions.file}:{predictions.blank[0]}"
        return f"{where}: the line is blank; {task.script} reads every line as JSON and stops (JSONDecodeError)"
    if not predictions.lines:
        stops = "takes the first of no captions and stops (IndexError)"
        if task.kind != "captions":
            stops = "divides by the number of answers and stops (ZeroDivisionError)"
        return f"{predictions.file}: has no line; {task.script} {stops}"
    if task.kind == "captions":
        return _captions(task, predictions, truth)
    return _SCRIPTS[task.script](task, predictions.lines, truth)


def _answers(fold: Callable[[str], str], skips: str = "", ids_as_text: bool = False) -> _Script:
    """Equality ignoring case: an empty answer equals an empty truth and is then right.

    skips        a prediction with this word is skipped, and still counted
    ids_as_text  question_ids are converted to text; otherwise 7 and "7" are different questions
    """

    def score(task: Task, lines: Sequence[Line], truth: Truth) -> Published | str:
        by_id = {str(item.id) if ids_as_text else item.id: item for item in truth.items}
        right = 0
        for line in lines:
            item = by_id.get(str(line.id) if ids_as_text else line.id)
            if item is None:
                return _unknown(task, line, truth)
            if line.text is None:
                return _null_stops(task, line)
            if skips and skips in line.text:
                continue
            answer = item.fields["answer"]
            if not isinstance(answer, str):
                return _no_text(task, item)
            right += fold(line.text) == fold(answer)
        return Published(100 * right / len(lines), right, len(lines))

    return score


def _by_position(task: Task, lines: Sequence[Line], truth: Truth) -> Published | str:
    """Containment either way: the empty text is contained in everything, so an empty prediction is right.

    Lines are paired with questions by position, whatever their question_id: one missing line shifts all others.
    """
    right = 0
    for place, line in enumerate(lines):
        if place >= len(truth.items):
            count = len(truth.items)
            return (
                f"{line.where}: there are only {count} questions; {task.script} stops at line {count + 1} (IndexError)"
            )
        item = truth.items[place]
        answer = item.fields["answer"]
        if line.text is None:
            return _null_stops(task, line)
        if not isinstance(answer, str):
            return _no_text(task, item)
        text, answer = line.text.upper(), answer.upper()
        right += text in answer or answer in text
    return Published(100 * right / len(lines), right, len(lines))


def _boxes(task: Task, lines: Sequence[Line], truth: Truth) -> Published | str:
    """More than one half of intersection over union, in floats scaled to pixels of the longer side.

    All square brackets are removed, and then the first and the last character of the rest, on the assumption that
    they were the brackets: `[0.10, 0.20, 0.50, 0.65]` is read as .10, .20, .50, 0.6, and `[0, ...` cannot be read.
    """
    by_id = {item.id: item for item in truth.items}
    right = 0
    for line in lines:
        item = by_id.get(line.id)
        if item is None:
            return _unknown(task, line, truth)
        size = item.fields.get("size")
        if not isinstance(size, list) or not size or not all(isinstance(side, int | float) for side in size):
            return f"{item.where}: size is {size!r}, not width and height; {task.script} stops"
        side = max(size)
        box, true = _cut_box(line.text), parsed_box(str(item.fields["answer_bbox"]))
        if box is not None and true is not None:
            right += _float_overlap([number * side for number in box], [float(number) * side for number in true]) > 0.5
    return Published(100 * right / len(lines), right, len(lines))


def _cut_box(text: str | None) -> list[float] | None:
    if text is None:  # the script catches every error here, this one included
        return None
    try:
        box = [float(number) for number in text.replace("[", "").replace("]", "")[1:-1].split(",")]
    except ValueError:
        return None
    return box if len(box) == 4 else None


def _float_overlap(one: Sequence[float], other: Sequence[float]) -> float:
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    inside = width * height
    union = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1]) - inside
    return inside / union if union > 0 else 0.0


def _letters(task: Task, lines: Sequence[Line], truth: Truth) -> Published | str:
    """The parsed letter, over all problems: an integer question_id is never found.

    Images are detected in the prediction's prompt, so a problem without a prediction has none; and
    if no prompt has the tag, the script divides by zero at the end.
    """
    by_id = {line.id: line for line in lines}
    right = with_image = right_with_image = 0
    for item, letter in zip(truth.items, truth.references, strict=True):
        line = by_id.get(item.id)
        if line is None:
            continue
        if line.text is None:
            return _null_stops(task, line)
        if not isinstance(line.prompt, str):
            what = "is not there" if line.prompt is msgspec.UNSET else "is not a text"
            return f"{line.where}: prompt {what}; {task.script} looks for the image tag in it and stops"
        hit = parsed_letter(line.text) == letter
        right += hit
        if "<image>" in line.prompt:
            with_image += 1
            right_with_image += hit
    if not with_image:
        return f"no prompt of a matched line has the image tag; {task.script} divides by their number and stops"
    total = len(truth.items)
    return Published(100 * right / total, right, total, {"image_accuracy": 100 * right_with_image / with_image})


def _captions(task: Task, predictions: Predictions, truth: Truth) -> Published | str:
    """The mean of the seven metrics: captions are numbered in file order, and line breaks inside them shift the
    rest.
    """
    said: dict[str | int, list[str]] = {image: [] for image in truth.images}
    for number, line in enumerate(predictions.lines, 1):  # not the line's question_id
        if line.text is None:
            return _null_stops(task, line)
        if number not in said:
            return (
                f"{line.where}: the script numbers it image {number}, and the annotations have {len(said)} images; "
                f"{task.script} stops (AssertionError)"
            )
        said[number] = [line.text]
    references = {image: list(texts) for image, texts in truth.images.items()}
    unequal = [image for image in references if bool(references[image]) != bool(said[image])]
    if unequal:
        lacks = "no reference caption" if said[unequal[0]] else "no caption"
        return f"{predictions.file}: image {unequal[0]} has {lacks}; {task.script} stops (AssertionError)"
    if not has_java():
        return NEEDS_JAVA
    truths, texts = _shifting_tokens(references), _shifting_tokens(said)
    if truths.keys() != texts.keys():
        return f"{predictions.file}: captions are lost between the tokenizer's lines; {task.script} stops"
    metrics = caption_metrics([texts[image][0] for image in truths], list(truths.values()), empty_is_wrong=False)
    score = 100 * mean_metric(metrics).score
    total = len(truths)
    return Published(score, score * total / 100, total, {name: 100 * metric.score for name, metric in metrics.items()})


def _shifting_tokens(captions: Mapping[str | int, Sequence[str]]) -> dict[str | int, list[str]]:
    """Only \\n becomes a blank: other line breaks give the tokenizer more lines than there are captions."""
    images = [image for image, texts in captions.items() for _ in texts]
    lines = ptb_lines("\n".join(text.replace("\n", " ") for texts in captions.values() for text in texts))
    found: dict[str | int, list[str]] = {}
    for image, line in zip(images, lines, strict=False):
        found.setdefault(image, []).append(without_punctuation(line))
    return found


def _null_stops(task: Task, line: Line) -> str:
    return f"{line.where}: text is null; {task.script} treats it as a text and stops"


def _unknown(task: Task, line: Line, truth: Truth) -> str:
    other = next((item for item in truth.items if str(item.id) == str(line.id)), None)
    beside = f", the annotations have {other.id!r}" if other else ", which is not annotated"
    return f"{line.where}: question_id is {line.id!r}{beside}; {task.script} stops (KeyError)"


def _no_text(task: Task, item: Item) -> str:
    return f"{item.where}: answer is the number {item.fields['answer']!r}; {task.script} treats it as a text and stops"


_Script = Callable[[Task, Sequence[Line], Truth], "Published | str"]

_SCRIPTS: Mapping[str, _Script] = {
    "eval_science_qa.py": _letters,
    "eval_ImagetNet.py": _by_position,
    "eval_vqav2.py": _answers(str.upper, ids_as_text=True),
    "eval_iconqa.py": _answers(str.upper),
    "eval_aokvqa.py": _answers(str.upper),
    "eval_ocrvqa.py": _answers(str.lower, skips="Unanswerable"),
    "eval_grounding.py": _boxes,
}
