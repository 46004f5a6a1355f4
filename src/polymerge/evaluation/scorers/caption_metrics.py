"""Captions against several references each: BLEU, METEOR, ROUGE-L, CIDEr and the mean of these seven numbers.

All by pycocoevalcap, on the tokens of the Penn Treebank tokenizer. BLEU, METEOR and CIDEr are corpus-level numbers:
CIDEr weighs words by how many references of the set have them, and is 0 for a single image. METEOR 1.5 (Denkowski and
Lavie 2014) and the tokenizer are Java programs that come with pycocoevalcap. The tokenizer is not run through
pycocoevalcap's own wrapper, which writes into the installed package and ignores failures of Java.
"""

from __future__ import annotations

import atexit
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from polymerge.errors import MissingExtraError, PolymergeError, RecipeError
from polymerge.evaluation.scorers.scored import Scored, check_pairs, texts_of

__all__ = [
    "METRICS",
    "NEEDS_JAVA",
    "NOT_PTB",
    "WITHOUT_JAVA",
    "Metric",
    "caption_metrics",
    "captions",
    "captions_module",
    "corpus_scorer",
    "has_java",
    "mean_metric",
    "meteor",
    "plain_tokens",
    "ptb_lines",
    "ptb_tokens",
    "without_punctuation",
]

METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")
WITHOUT_JAVA = tuple(name for name in METRICS if name != "METEOR")

NEEDS_JAVA = (
    "there is no `java` on the PATH, which METEOR and the Penn Treebank tokenizer need. Install a Java runtime, such "
    "as default-jre-headless"
)
NOT_PTB = (
    "captions were cut into words by a plain tokenizer, not the Penn Treebank one, which needs `java`: these numbers "
    "can be compared with each other, not with published ones"
)


def has_java() -> bool:
    """Return whether `java` is on the PATH."""
    return shutil.which("java") is not None


def captions_module(name: str) -> Any:
    """Import a module of pycocoevalcap.

    raises MissingExtraError without it.
    """
    try:
        return import_module(f"pycocoevalcap.{name}")
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"caption metrics need {error.name}: pip install 'polymerge[captions]'") from None


# metrics


@dataclass(frozen=True)
class Metric:
    """A metric of the corpus and of each caption alone, from pycocoevalcap: in [0, 1], CIDEr in [0, 10]."""

    score: float
    each: tuple[float, ...]


def caption_metrics(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    names: Iterable[str] = METRICS,
    *,
    empty_is_wrong: bool = True,
) -> dict[str, Metric]:
    """Compute metrics of captions that are already tokenised; returns them by name.

    predictions     tokens joined by blanks, one text an image
    references      the same, at least one text an image, and a word in at least one of them
    names           of METRICS; METEOR needs Java
    empty_is_wrong  ROUGE-L is 0 for a caption without a word; pycocoevalcap gives 1 for a reference without one

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
    """The mean of several metrics; the per-caption means do not average to the corpus's."""
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
    """Build the scorer of one of METRICS; without Java all but METEOR score plain tokens, with a note."""

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


# words

_LINE_ENDS = re.compile("[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]")
_ENDING = r"(?:n't|'(?:s|m|d|re|ve|ll))\b"
_BEFORE_ENDING = re.compile(rf"(?<=\w)(?={_ENDING})")
_WORD = re.compile(rf"{_ENDING}|[#@]?[^\W_]+(?:[-./'][^\W_]+)*|[$%&|]")


def _tokenised(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]], bool]:
    """Predictions and references as tokens joined by blanks, and whether these are the Penn Treebank tokenizer's."""
    ptb = has_java()
    tokens = ptb_tokens if ptb else plain_tokens
    said, words = tokens(predictions), iter(tokens([text for texts in references for text in texts]))
    return said, [[next(words) for _ in texts] for texts in references], ptb


def ptb_tokens(texts: Sequence[str]) -> list[str]:
    """Each text's Penn Treebank tokens in lower case, without punctuation.

    Line breaks inside a text are replaced by blanks: the tokenizer works by line, and would shift everything that
    follows. It looks at the next line to tell a full stop from an abbreviation, so the order of the texts can change
    a token; pass them in the order of the annotations, as is usual.

    raises MissingExtraError without Java or pycocoevalcap, PolymergeError if the tokenizer fails.
    """
    lines = ptb_lines("\n".join(_one_line(text) for text in texts))
    if len(lines) < len(texts) or any(line.strip() for line in lines[len(texts) :]):
        raise PolymergeError(f"the Penn Treebank tokenizer made {len(lines)} lines of {len(texts)} captions")
    return [without_punctuation(line) for line in lines[: len(texts)]]


def _one_line(text: str) -> str:
    """Replace every character that any of the programs treats as a line break with a blank."""
    return _LINE_ENDS.sub(" ", text)


def without_punctuation(line: str) -> str:
    """Drop the tokens that caption metrics ignore from a line of the tokenizer's output."""
    left_out = frozenset(captions_module("tokenizer.ptbtokenizer").PUNCTUATIONS)
    return " ".join(token for token in line.rstrip().split(" ") if token not in left_out)


def plain_tokens(texts: Sequence[str]) -> list[str]:
    """Words in lower case without punctuation, n't and 's split off; close to the Penn Treebank's on plain English."""
    apart = (_BEFORE_ENDING.sub(" ", text.lower().replace("’", "'")) for text in texts)
    return [" ".join(_WORD.findall(text)) for text in apart]


@lru_cache(maxsize=8)  # the references of a task are the same for every model
def ptb_lines(text: str) -> tuple[str, ...]:
    """The tokens of each line of a text, joined by blanks, with the tokenizer's notion of lines.

    raises MissingExtraError without Java or pycocoevalcap, PolymergeError if the tokenizer fails.
    """
    module = captions_module("tokenizer.ptbtokenizer")
    if not has_java():
        raise MissingExtraError(NEEDS_JAVA)
    jar = Path(module.__file__).parent / module.STANFORD_CORENLP_3_4_1_JAR
    options = ["-encoding", "utf-8", "-preserveLines", "-lowerCase"]
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", *options]
    done = subprocess.run(command, input=text.encode("utf-8"), capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise PolymergeError(f"the Penn Treebank tokenizer failed with status {done.returncode}: {' '.join(said[-3:])}")
    return tuple(done.stdout.decode("utf-8").split("\n"))


# METEOR, kept running once it is started


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, tuple[float, ...]]:
    """METEOR of a corpus of tokenised texts, and of each text by itself, in [0, 1].

    raises MissingExtraError without Java or pycocoevalcap, PolymergeError where the program fails.
    """
    # the program goes by lines: one too many, and it and we would wait for each other
    said = tuple(_one_line(text) for text in predictions)
    return _meteor(said, tuple(tuple(_one_line(text) for text in texts) for texts in references))


@lru_cache(maxsize=64)
def _meteor(predictions: tuple[str, ...], references: tuple[tuple[str, ...], ...]) -> tuple[float, tuple[float, ...]]:
    engine = _engine()
    try:
        score, scores = engine.compute_score(
            {place: list(texts) for place, texts in enumerate(references)},
            {place: [text] for place, text in enumerate(predictions)},
        )
    except (OSError, ValueError) as error:  # it ended, or said something that is no number
        _close_engine()
        raise PolymergeError(f"METEOR stopped before it had scored {len(predictions)} captions: {error}") from None
    return float(score), tuple(float(share) for share in scores)


@lru_cache(maxsize=1)  # it takes seconds to start
def _engine() -> Any:
    module = captions_module("meteor.meteor")
    if not has_java():
        raise MissingExtraError(NEEDS_JAVA)
    engine = module.Meteor()
    atexit.register(_close, engine)
    return engine


def _close_engine() -> None:
    _close(_engine())
    _engine.cache_clear()


def _close(engine: Any) -> None:
    if engine.lock.locked():
        engine.lock.release()  # pycocoevalcap keeps it after an error and would wait for itself for ever
    process = engine.meteor_p
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        try:
            pipe.close()
        except BrokenPipeError:  # what was left to say to it
            continue
