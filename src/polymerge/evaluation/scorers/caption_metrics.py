"""Captions against several references each: BLEU, METEOR, ROUGE-L, CIDEr and the mean of the seven numbers.

All by pycocoevalcap, on the tokens of the Penn Treebank tokenizer. BLEU, METEOR and CIDEr are numbers of the whole set:
CIDEr weighs words by how many references of the set have them, and is 0 for a single image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polymerge.errors import MissingExtraError, RecipeError
from polymerge.evaluation.scorers.caption_words import NOT_PTB, tokens
from polymerge.evaluation.scorers.java import NEEDS_JAVA, captions_module, has_java
from polymerge.evaluation.scorers.meteor import meteor
from polymerge.evaluation.scorers.scored import Scored, check_pairs, texts_of

__all__ = ["METRICS", "WITHOUT_JAVA", "Metric", "caption_metrics", "captions", "corpus_scorer", "mean_metric"]

METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")
WITHOUT_JAVA = tuple(name for name in METRICS if name != "METEOR")


@dataclass(frozen=True)
class Metric:
    """A metric of the set and of each caption alone, as pycocoevalcap gives them: in [0, 1], CIDEr in [0, 10]."""

    score: float
    each: tuple[float, ...]


def caption_metrics(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    names: Iterable[str] = METRICS,
    *,
    empty_is_wrong: bool = True,
) -> dict[str, Metric]:
    """The metrics of captions that are already tokenised, by name.

    predictions     tokens joined by blanks, one text an image
    references      the same, at least one text an image, and a word in at least one of them
    names           of METRICS; METEOR needs Java
    empty_is_wrong  ROUGE-L is 0 for a caption without a word; pycocoevalcap gives 1 beside a reference without one

    raises MissingExtraError without pycocoevalcap or, for METEOR, Java; RecipeError where no reference has a word.
    """
    wanted = tuple(names)
    if not any(text.strip() for texts in references for text in texts):
        raise RecipeError("no reference caption has a word: there is nothing to compare with")
    truths = {place: list(texts) for place, texts in enumerate(references)}
    said = {place: [text] for place, text in enumerate(predictions)}
    found: dict[str, Metric] = {}
    if any(name.startswith("Bleu") for name in wanted):
        scores, each = captions_module("bleu.bleu").Bleu(4).compute_score(truths, said, verbose=0)
        found |= {f"Bleu_{n}": _metric(scores[n - 1], each[n - 1]) for n in range(1, 5)}
    if "METEOR" in wanted:
        found["METEOR"] = _metric(*meteor(predictions, references))
    if "ROUGE_L" in wanted:
        score, each = captions_module("rouge.rouge").Rouge().compute_score(truths, said)
        if empty_is_wrong:
            each = [share if text.strip() else 0.0 for share, text in zip(each, predictions, strict=True)]
            score = sum(each) / len(each)
        found["ROUGE_L"] = _metric(score, each)
    if "CIDEr" in wanted:
        found["CIDEr"] = _metric(*captions_module("cider.cider").Cider().compute_score(truths, said))
    return {name: found[name] for name in wanted}


def _metric(score: Any, each: Iterable[Any]) -> Metric:
    return Metric(float(score), tuple(float(share) for share in each))


def mean_metric(metrics: Mapping[str, Metric]) -> Metric:
    """The mean of several metrics; that of each caption does not average to that of the set."""
    each = zip(*(metric.each for metric in metrics.values()), strict=True)
    return Metric(
        sum(metric.score for metric in metrics.values()) / len(metrics),
        tuple(sum(shares) / len(metrics) for shares in each),
    )


def captions(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """The mean of BLEU-1 to 4, METEOR, ROUGE-L and CIDEr, in percent; `references` are a text or a list of texts.

    The samples are the same mean of each caption alone. They show which captions differ, but do not average to the
    score.

    raises MissingExtraError without pycocoevalcap or Java: there is no such mean without METEOR.
    """
    check_pairs(predictions, references)
    if not has_java():
        raise MissingExtraError(f"{NEEDS_JAVA}, or score by cider, rouge_l or bleu_4, which do without")
    said, truths, _ = _tokenised(predictions, texts_of(references))
    metrics = caption_metrics(said, truths)
    mean = mean_metric(metrics)
    return _scored(mean, mean.each, (), {name: 100 * metric.score for name, metric in metrics.items()})


def corpus_scorer(name: str) -> Callable[[Sequence[str], Sequence[Any]], Scored]:
    """The scorer for one of METRICS alone; all but METEOR do without Java, on plain tokens and with a note."""

    def score(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
        check_pairs(predictions, references)
        if name == "METEOR" and not has_java():
            raise MissingExtraError(NEEDS_JAVA)
        said, truths, ptb = _tokenised(predictions, texts_of(references))
        metric = caption_metrics(said, truths, [name])[name]
        return _scored(metric, metric.each if name in ("ROUGE_L", "CIDEr") else None, () if ptb else (NOT_PTB,), {})

    return score


def _scored(
    metric: Metric, samples: tuple[float, ...] | None, notes: tuple[str, ...], metrics: Mapping[str, float | None]
) -> Scored:
    total = len(metric.each)
    return Scored(100 * metric.score, metric.score * total, total, samples, notes, metrics)


def _tokenised(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]], bool]:
    said, ptb = tokens(predictions)
    flat, _ = tokens([text for texts in references for text in texts])
    words = iter(flat)
    return said, [[next(words) for _ in texts] for texts in references], ptb
