"""JSON as people write it, a value a line or one list; every error names its line."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

from polymerge.errors import RecipeError, refuse

__all__ = ["json_lines", "parse_json"]

_BOM = b"\xef\xbb\xbf"


def json_lines(data: bytes, file: str) -> Iterator[tuple[int, Any]]:
    """The value of each line that is not blank, with the line's number from 1; only a line feed ends a line.

    file  what messages call it

    A broken line is refused by its number and left out.
    """
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.removeprefix(_BOM).strip():
            try:
                value = parse_json(line, file, number)
            except RecipeError as problem:
                refuse(problem)
            else:
                yield number, value


def parse_json(text: bytes, file: str, line: int = 1) -> Any:
    """The JSON value of a text, without NaN, infinity, a key twice in one object or half a surrogate pair.

    line  the number of the text's first line in the file

    raises RecipeError that names file and line.
    """
    try:
        value = json.loads(
            text.removeprefix(_BOM if line == 1 else b"").decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_no_number,
            parse_float=_finite,
        )
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        number, byte = line + text.count(b"\n", 0, error.start), text[error.start]
        raise RecipeError(
            f"{file}: line {number}: not UTF-8: there is a byte 0x{byte:02x}. Save it as UTF-8."
        ) from None
    except UnicodeEncodeError:
        raise RecipeError(f"{file}: line {line}: holds half a surrogate pair, which is no text") from None
    except json.JSONDecodeError as error:
        number = line + error.lineno - 1
        raise RecipeError(f"{file}: line {number}: not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise RecipeError(f"{file}: line {line}: nested too deeply to be read") from None
    except ValueError as error:  # what the hooks below refuse, and numbers with thousands of digits
        raise RecipeError(f"{file}: line {line}: {error}") from None
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"'{twice[0]}' appears twice in one object")
    return found


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number that JSON has")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits} is too large for a number")
    return number
