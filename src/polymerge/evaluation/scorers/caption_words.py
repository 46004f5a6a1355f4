"""Captions as words: by the Penn Treebank tokenizer where there is Java, by a plain one otherwise."""

from __future__ import annotations

import re
from collections.abc import Sequence

from polymerge.errors import PolymergeError
from polymerge.evaluation.scorers.java import has_java, ptb_lines, ptb_punctuation

__all__ = ["NOT_PTB", "one_line", "plain_tokens", "ptb_tokens", "tokens", "without_punctuation"]

NOT_PTB = (
    "captions were cut into words by a plain tokenizer, not the Penn Treebank one, which needs `java`: these numbers "
    "can be compared with each other, not with published ones"
)

_LINE_ENDS = re.compile("[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]")
_ENDING = r"(?:n't|'(?:s|m|d|re|ve|ll))\b"
_BEFORE_ENDING = re.compile(rf"(?<=\w)(?={_ENDING})")
_WORD = re.compile(rf"{_ENDING}|[#@]?[^\W_]+(?:[-./'][^\W_]+)*|[$%&|]")


def tokens(texts: Sequence[str]) -> tuple[list[str], bool]:
    """Each text's tokens, joined by blanks, and whether they are the Penn Treebank tokenizer's."""
    if has_java():
        return ptb_tokens(texts), True
    return plain_tokens(texts), False


def ptb_tokens(texts: Sequence[str]) -> list[str]:
    """Each text's Penn Treebank tokens in lower case, without punctuation.

    Whatever ends a line inside a text is read as a blank: the tokenizer goes by lines, and would shift all that
    follows. It looks at the next line to tell a full stop from an abbreviation, so the order of the texts can change
    a token; give them in the order of the annotations, as everybody does.

    raises MissingExtraError without Java or pycocoevalcap, PolymergeError where the tokenizer fails.
    """
    lines = ptb_lines("\n".join(one_line(text) for text in texts))
    if len(lines) < len(texts) or any(line.strip() for line in lines[len(texts) :]):
        raise PolymergeError(f"the Penn Treebank tokenizer made {len(lines)} lines of {len(texts)} captions")
    return [without_punctuation(line) for line in lines[: len(texts)]]


def one_line(text: str) -> str:
    """A text with every character that some program takes for a line end as a blank."""
    return _LINE_ENDS.sub(" ", text)


def without_punctuation(line: str) -> str:
    """A line of the tokenizer without the tokens that caption metrics leave out."""
    left_out = ptb_punctuation()
    return " ".join(token for token in line.rstrip().split(" ") if token not in left_out)


def plain_tokens(texts: Sequence[str]) -> list[str]:
    """Words in lower case without punctuation, n't and 's split off; close to the Penn Treebank's on plain English."""
    apart = (_BEFORE_ENDING.sub(" ", text.lower().replace("’", "'")) for text in texts)
    return [" ".join(_WORD.findall(text)) for text in apart]
