"""The published caption scripts: captions are numbered in file order, and line ends inside them shift the rest.

The scripts also build SPICE, which downloads a parser, and leave it out of what they print; it is not run here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polymerge.evaluation.mm_mergebench.annotations import Truth
from polymerge.evaluation.mm_mergebench.published import Published, null_stops
from polymerge.evaluation.mm_mergebench.tasks import Task
from polymerge.evaluation.predictions import Predictions
from polymerge.evaluation.scorers.caption_metrics import caption_metrics, mean_metric
from polymerge.evaluation.scorers.caption_words import without_punctuation
from polymerge.evaluation.scorers.java import NEEDS_JAVA, has_java, ptb_lines

__all__ = ["published_captions"]


def published_captions(task: Task, predictions: Predictions, truth: Truth) -> Published | str:
    """The mean of the seven metrics as the scripts print it, or why they stop."""
    said: dict[Any, list[str]] = {image: [] for image in truth.images}
    for number, line in enumerate(predictions.lines, 1):  # not the line's question_id
        if line.text is None:
            return null_stops(task, line)
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


def _shifting_tokens(captions: Mapping[Any, Sequence[str]]) -> dict[Any, list[str]]:
    """Only \\n is made a blank: other line ends make the tokenizer's lines more than the captions."""
    images = [image for image, texts in captions.items() for _ in texts]
    lines = ptb_lines("\n".join(text.replace("\n", " ") for texts in captions.values() for text in texts))
    found: dict[Any, list[str]] = {}
    for image, line in zip(images, lines, strict=False):
        found.setdefault(image, []).append(without_punctuation(line))
    return found
