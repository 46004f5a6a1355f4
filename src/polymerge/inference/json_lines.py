"""JSON written by people, one value per line or one list; every error names its line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from polymerge.checkpoints.bounds import RECORDS_BYTES
from polymerge.checkpoints.json_objects import parse_json, read_text
from polymerge.errors import RecipeError, refuse

__all__ = ["json_lines", "json_list"]

_THEN = "Correct it."


def json_lines(lines: Iterable[bytes], file: str) -> Iterator[tuple[int, Any]]:
    """Yield the value of each non-blank line with its number, from 1.

    lines  as separated by line feeds, and by nothing else
    file   its name in messages

    Broken lines are refused by number and skipped.
    """
    for number, ended in enumerate(lines, 1):
        line = (ended.removeprefix(b"\xef\xbb\xbf") if number == 1 else ended).removesuffix(b"\n")
        if line.strip():
            try:
                value = _parsed(line, f"{file}: line {number}", object)
            except RecipeError as problem:
                refuse(problem)
            else:
                yield number, value


def json_list(file: Path) -> list[Any]:
    """Parse a file that holds a list; raises RecipeError."""
    values: list[Any] = _parsed(_text(file), str(file), list)
    return values


def _text(file: Path) -> str:
    return read_text(file, encoding="utf-8-sig", most=RECORDS_BYTES, error=RecipeError, then=_THEN)


def _parsed(text: bytes | str, where: str, kind: Any) -> Any:
    value = parse_json(text, where, kind, error=RecipeError, then=_THEN)
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise RecipeError(f"{where}: holds NaN, infinity or a number too large, which JSON has not. {_THEN}") from None
    return value
