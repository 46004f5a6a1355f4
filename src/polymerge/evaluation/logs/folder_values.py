"""Which value of the coefficient a candidate's folder stands for, from its name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from polymerge.checkpoints.tensor_info import listed
from polymerge.errors import RecipeError

__all__ = ["Named", "values_of"]

_WORDS = "alpha|weight|lambda|scale|density|coef|value|w"
_DECIMAL = r"\d*\.\d+(?:e[-+]?\d+)?"
_WHOLE = r"\d+(?:e[-+]?\d+)?(?![_,]-?\d{1,3}(?![0-9A-Za-z]))"  # `alpha_0_4` may well mean 0.4, so it is not read as 0
_END = r"(?![0-9A-Za-z]|\.)"
_AFTER_WORD = re.compile(
    rf"(?<![A-Za-z0-9])(?P<word>{_WORDS})[-_=]?(?P<number>(?:(?<=[-_=])-)?(?:{_DECIMAL}|{_WHOLE})){_END}",
    re.ASCII | re.IGNORECASE,
)
_ALONE = re.compile(rf"(?<![0-9A-Za-z.])(?P<number>(?:(?<![^_=])-)?{_DECIMAL}){_END}", re.ASCII | re.IGNORECASE)
_SIGN_OR_DASH = re.compile(r"(?:[^=]_-|--)(?=\d*\.\d)", re.ASCII)  # `run_-0.1`
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_HINT = "Say where the value stands with --value-pattern, such as --value-pattern 'alpha-([0-9.]+)'."


class Named(NamedTuple):
    """A candidate's folder and its value, as a number and as the name writes it."""

    folder: str
    value: float
    text: str


def values_of(folders: Sequence[str], pattern: str | None = None) -> tuple[list[Named], list[str]]:
    """The folders that have a value in their name, in ascending order of it, and those that have none.

    pattern  regular expression with one group, the number; it may match anywhere in the name

    Without a pattern, a number after a word such as `alpha` or `weight` counts, else a decimal that stands by itself:
    `llava-1.5-7b_0.4`. Where a name has several, the one that differs from folder to folder counts.

    Raises RecipeError where the pattern is wrong, where names can be read in two ways, where none has a value, and
    where two folders have the same.
    """
    texts = _by_pattern(folders, pattern) if pattern is not None else _by_name(folders)
    if not texts:
        raise RecipeError(f"no folder has a value in its name: {listed(folders, 8)}. {_HINT}")
    if wrong := [folder for folder, text in texts.items() if not _is_number(text)]:
        raise RecipeError(
            f"--value-pattern {pattern}: what it finds is no finite number: "
            + ", ".join(f"'{texts[folder]}' in '{folder}'" for folder in wrong[:8])
            + "."
        )
    named = sorted((Named(folder, float(text), text) for folder, text in texts.items()), key=lambda one: one.value)
    by_value: dict[float, list[str]] = {}
    for one in named:
        by_value.setdefault(one.value, []).append(one.folder)
    if twice := {value: group for value, group in by_value.items() if len(group) > 1}:
        both = "; ".join(f"{value} in {listed(group, 8)}" for value, group in twice.items())
        raise RecipeError(
            f"several folders have the same value: {both}. Move one of them away, or, where the value stands "
            f"elsewhere in the name, say so with --value-pattern."
        )
    return named, [folder for folder in folders if folder not in texts]


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None and math.isfinite(float(text))


def _by_pattern(folders: Iterable[str], pattern: str) -> dict[str, str]:
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise RecipeError(f"--value-pattern {pattern}: is no regular expression: {error}") from None
    if compiled.groups != 1:
        raise RecipeError(
            f"--value-pattern {pattern}: has {compiled.groups} groups, it needs exactly one, around the number, "
            "such as 'alpha-([0-9.]+)'. Write (?:...) for groups that only hold things together."
        )
    matches = {folder: compiled.search(folder) for folder in folders}
    return {folder: match[1] for folder, match in matches.items() if match and match[1] is not None}


def _by_name(folders: Sequence[str]) -> dict[str, str]:
    after_words = {folder: _numbered(_AFTER_WORD.finditer(folder)) for folder in folders}
    if any(after_words.values()):
        return _that_differs({folder: found for folder, found in after_words.items() if found})
    alone = {folder: found for folder in folders if (found := _numbered(_ALONE.finditer(folder)))}
    texts = _that_differs(alone)
    unlike = len(set(map(_word_before, alone))) > 1 and all(len(found) == 1 for found in alone.values())
    if unlike or any(_SIGN_OR_DASH.search(folder) for folder in alone):
        raise _two_ways(alone)
    return texts | _whole_numbers([folder for folder in folders if folder not in alone], texts)


def _numbered(matches: Iterable[re.Match[str]]) -> dict[tuple[str, int], str]:
    """Each number by the word before it and its place among the numbers of that word."""
    found: dict[tuple[str, int], str] = {}
    for match in matches:
        word = match.groupdict().get("word", "").lower()
        found[word, sum(known == word for known, _ in found)] = match["number"]
    return found


def _that_differs(found: Mapping[str, Mapping[tuple[str, int], str]]) -> dict[str, str]:
    """For each folder the only number, or the one of several whose place has another number in each folder."""
    places = {tuple(numbers) for numbers in found.values()}
    if len(places) > 1:
        raise _two_ways(found)
    for only in places:
        differing = [place for place in only if len({numbers[place] for numbers in found.values()}) > 1]
        chosen = only if len(only) == 1 else differing
        if len(chosen) != 1:
            raise _two_ways(found)
        return {folder: numbers[chosen[0]] for folder, numbers in found.items()}
    return {}


def _two_ways(folders: Iterable[str]) -> RecipeError:
    return RecipeError(f"the value can be read in more than one way from the names {listed(list(folders), 8)}. {_HINT}")


def _word_before(folder: str) -> str:
    """The word before the first decimal: the `llava` of `llava-1.5-7b` is not the `run` of `run_0.3`."""
    match = _ALONE.search(folder)
    words = re.findall(r"[^\W\d_]+", folder[: match.start()] if match else folder)
    return words[-1].lower() if words else ""


def _whole_numbers(folders: Iterable[str], texts: Mapping[str, str]) -> dict[str, str]:
    """Values written without a point in names that are otherwise like one that has a decimal: `run-1` by `run-0.5`."""
    around = {tuple(folder.rsplit(text, 1)) for folder, text in texts.items()}
    found = {}
    for folder in folders:
        for before, after in around:
            middle = folder.removeprefix(before).removesuffix(after)
            if folder == before + middle + after and re.fullmatch(r"\d+", middle, re.ASCII):
                found[folder] = middle
    return found
