"""VQA accuracy against ten annotators, Antol et al. 2015, arXiv:1505.00468, with the tools' answer normalisation.

An answer is worth min(1, agreeing annotators / 3), averaged over leaving out each annotator once.
Three policies are in use; they differ in how answers are rewritten before they are compared:

| scorer | rewriting | used by |
|---|---|---|
| vqa | punctuation, then digits and articles, always | VQAv2 in lmms-eval |
| vqa_official | the same, but nothing at all where all annotators wrote the same | the VQA authors' own script |
| vqa_evalai | lower case, no `,` and `?`, `'s` split off, then the same | EvalAI, OK-VQA and others in lmms-eval |

All three keep two accidents of the authors' script, since every published number has them: only the first 32 full
stops are removed, and `?` or `/` next to a blank vanishes where elsewhere it becomes a blank. An empty answer is
right where annotators left theirs empty. With fewer than four annotators no answer
could score 100 %, so that is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from polymerge.errors import RecipeError, refuse_if_any
from polymerge.evaluation.scorers.scored import Scored, averaged, check_pairs, texts_of

__all__ = ["evalai", "punctuation_then_words", "vqa", "vqa_evalai", "vqa_official"]


def vqa(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """Accuracy against annotators, as for VQAv2 in lmms-eval; `references` are the annotators' answers."""
    return _scored(predictions, references, punctuation_then_words)


def vqa_official(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """As in the VQA authors' script: answers that all annotators agree on are compared unchanged."""
    return _scored(predictions, references, punctuation_then_words, as_it_stands_if_unanimous=True)


def vqa_evalai(predictions: Sequence[str], references: Sequence[Any]) -> Scored:
    """As on the EvalAI server, and for OK-VQA, TextVQA and VizWiz in lmms-eval."""
    return _scored(predictions, references, evalai)


_FEWEST = 4


def _scored(
    predictions: Sequence[str],
    references: Sequence[Any],
    rewrite: Callable[[str], str],
    as_it_stands_if_unanimous: bool = False,
) -> Scored:
    check_pairs(predictions, references)
    annotated = texts_of(references)
    refuse_if_any(
        RecipeError(
            f"reference {place}: {len(answers)} annotators, and an answer that all of them gave is wholly right from "
            f"{_FEWEST} on. Score by exact or exact_normalised instead"
        )
        for place, answers in enumerate(annotated)
        if len(answers) < _FEWEST
    )
    samples = []
    for text, answers in zip(predictions, annotated, strict=True):
        said, given = _one_line(text), [_one_line(answer) for answer in answers]
        if not (as_it_stands_if_unanimous and len(set(given)) == 1):
            said, given = rewrite(said), [rewrite(answer) for answer in given]
        samples.append(_agreement(said, given))
    return averaged(samples)


def _agreement(said: str, given: Sequence[str]) -> float:
    agree = given.count(said)
    shares = [min(1.0, (agree - (answer == said)) / 3) for answer in given]
    return sum(shares) / len(shares)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def punctuation_then_words(text: str) -> str:
    """Normalise an answer: no punctuation or articles, numbers to ten as digits, apostrophes restored."""
    return _words(_punctuation(_one_line(text)))


def evalai(text: str) -> str:
    """The same after lower-casing, without `,` and `?`, and with `'s` split off."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return punctuation_then_words(text)


_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"\d,\d")
_FULL_STOPS_REMOVED = 32
"""The authors' script gives re.UNICODE, which is 32, where re.sub takes the number of replacements."""


def _punctuation(text: str) -> str:
    kept = text
    thousands = _THOUSANDS.search(text) is not None
    for mark in _MARKS:
        beside_a_blank = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if beside_a_blank or thousands else " ")
    return _FULL_STOP.sub("", kept, count=_FULL_STOPS_REMOVED)


def _words(text: str) -> str:
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in ("a", "an", "the"))


_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}

_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
"""The contractions in the authors' script; I'd, she'd and others whose bare form is a word are not among them."""

_APOSTROPHES = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # the wrong way round in the script
"""Each contraction by its forms that lack one apostrophe."""
