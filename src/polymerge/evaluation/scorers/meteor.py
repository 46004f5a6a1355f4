"""METEOR 1.5, Denkowski and Lavie 2014: a Java program that comes with pycocoevalcap, kept running once started."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from polymerge.errors import MissingExtraError, PolymergeError
from polymerge.evaluation.scorers.caption_words import one_line
from polymerge.evaluation.scorers.java import NEEDS_JAVA, captions_module, has_java

__all__ = ["meteor"]


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, tuple[float, ...]]:
    """METEOR of a set of tokenised texts, and of each text alone, in [0, 1].

    raises MissingExtraError without Java or pycocoevalcap, PolymergeError where the program fails.
    """
    # the program goes by lines: one too many, and it and we would wait for each other
    said = tuple(one_line(text) for text in predictions)
    return _meteor(said, tuple(tuple(one_line(text) for text in texts) for texts in references))


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
