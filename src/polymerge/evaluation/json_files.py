"""JSON that somebody else wrote: read whole, or said to be broken with file and line."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from polymerge.errors import PolymergeError, RecipeError

__all__ = ["MOST_SHOWN", "Broken", "json_of", "kind_of", "shortened", "text_of_file"]

MOST_SHOWN = 20
"""Problems of one file that are listed; a file of the wrong kind has one on every line."""

_KINDS = {list: "an array", str: "a text", int: "a number", float: "a number", bool: "a truth value", dict: "an object"}


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Broken(ValueError):  # noqa: N818 (what a text is, said where it was found)
    """What is wrong with a JSON text, for the reader to say where."""


def kind_of(value: object) -> str:
    """A JSON value's kind in words."""
    return _KINDS.get(type(value), "null")


def text_of_file(path: Path) -> str:
    """A file's text.

    raises RecipeError where it cannot be read or is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}. Check the path.") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{path}:{line}: is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}. Save it as UTF-8."
        ) from None


def json_of(text: str) -> Any:
    """The value of a JSON text; a key that appears twice in one object is refused, since readers differ on it.

    raises Broken with what is wrong and where in the text.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise Broken(f"is not JSON: {error.msg.removesuffix(' at')} at {line}column {error.colno}") from None
    except UnicodeEncodeError:
        raise Broken("holds half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise Broken("is nested too deeply to be read") from None
    except ValueError as error:  # duplicate keys, numbers with thousands of digits
        raise Broken(f"cannot be read: {error}") from None
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"{', '.join(twice)} appears twice in one object")
    return found


def shortened(problems: list[PolymergeError], path: Path) -> list[PolymergeError]:
    """A file's problems, the many that are left as a count."""
    if len(problems) <= MOST_SHOWN:
        return problems
    rest = len(problems) - MOST_SHOWN
    return [*problems[:MOST_SHOWN], RecipeError(f"{path}: {rest} more problems like these")]
