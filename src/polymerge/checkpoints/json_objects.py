"""JSON from other programs: parsed, checked against a type, and refused with file, place and both values.

Syntax is left to Python's parser, because configs may contain `Infinity` and because duplicate keys have to
be detected; the types of the values are checked by msgspec.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice, pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, TypeVar, Union, get_args, get_origin

import msgspec

from polymerge.checkpoints.bounds import CONFIG_BYTES, DIGITS, JSON_VALUES, NESTING, read_bounded
from polymerge.checkpoints.tensor_info import listed
from polymerge.errors import CheckpointError, PolymergeError, Refused, shown

__all__ = ["checked", "parse_json", "read_json", "read_text", "strings_at"]

T = TypeVar("T")

_AGAIN: Final = "Download it again."
_MOST_PROBLEMS: Final = 20  # of one value; one of the wrong kind has a problem in every member
_MOST_LOOKED_AT: Final = 10_000  # before the rest is not counted
_MOST_SHOWN: Final = 60  # characters of a wrong value
_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")
_TOKEN: Final = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]')


def read_json(
    file: Path,
    type: type[T],  # noqa: A002 (msgspec's name for it)
    *,
    unique_keys: bool = True,
    encoding: str = "utf-8",
    most: int = CONFIG_BYTES,
    error: type[PolymergeError] = CheckpointError,
    then: str = _AGAIN,
) -> T:
    """Read a JSON file as a value of `type`; the other parameters are those of `parse_json`.

    encoding  `utf-8-sig` to accept a byte order mark as well
    most      maximum length of the file in bytes

    Raises `error` if the file cannot be read, and as `parse_json` does.
    """
    text = read_text(file, encoding=encoding, most=most, error=error, then=then)
    return parse_json(text, str(file), type, unique_keys=unique_keys, error=error, then=then)


def read_text(
    file: Path,
    *,
    encoding: str = "utf-8",
    most: int = CONFIG_BYTES,
    error: type[PolymergeError] = CheckpointError,
    then: str = _AGAIN,
) -> str:
    """Read a text file of at most `most` bytes; raises `error`, with the line, if it cannot be read or is not UTF-8."""
    try:
        content = read_bounded(file, most)
    except OSError as wrong:
        raise error(f"{file}: cannot be read: {wrong.strerror or wrong}. Check the path and its permissions.") from None
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as wrong:
        line = content.count(b"\n", 0, wrong.start) + 1
        raise error(f"{file}:{line}: {_not_utf8(wrong)}. {then}") from None


def parse_json(
    text: bytes | str,
    where: str,
    type: type[T],  # noqa: A002
    *,
    unique_keys: bool = True,
    lenient: bool = False,
    most: int = JSON_VALUES,
    error: type[PolymergeError] = CheckpointError,
    then: str = _AGAIN,
) -> T:
    """Parse JSON as a value of `type`: a msgspec Struct, or any other type that msgspec converts to.

    where        the beginning of every message: the file, or the file and the line
    unique_keys  refuse a key that appears twice in one object: readers differ on which of the two they use, so that one
                 file would mean different things to different programs
    lenient      accept what cannot be written or computed with: halves of surrogate pairs, numbers as long as Python
                 reads them
    most         maximum number of values and keys
    error, then  the class of the exception, and the next step that ends its message

    Raises `error` if `text` is not UTF-8, not JSON, more or deeper than a file of that kind is (`bounds`), or not of
    the type; Refused if several members are not.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode()
        if sum(map(text.count, ",:[{")) > most:
            raise ValueError(f"it holds more than {most} values")
        pairs, whole = _without_duplicates if unique_keys else None, None if lenient else _whole
        value = json.loads(text, object_pairs_hook=pairs, parse_int=whole)
        if text.count("[") + text.count("{") > NESTING and _deeper(value):
            raise RecursionError
        if not lenient and _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as wrong:
        raise error(f"{where}: {_not_utf8(wrong)}. {then}") from None
    except UnicodeEncodeError:
        raise error(f"{where}: holds half of a surrogate pair, which is no character. {then}") from None
    except json.JSONDecodeError as wrong:
        line = f"line {wrong.lineno}, " if "\n" in wrong.doc else ""
        place = f"{line}column {wrong.colno}"
        raise error(f"{where}: is not JSON: {wrong.msg.removesuffix(' at')} at {place}. {then}") from None
    except RecursionError:
        raise error(f"{where}: is nested too deeply to be read. {then}") from None
    except ValueError as wrong:  # duplicate keys, too many values, numbers with too many digits
        raise error(f"{where}: cannot be read: {wrong}. {then}") from None
    return checked(value, type, where, error=error, then=then)


def checked(
    value: Any,
    type: type[T],  # noqa: A002
    where: str,
    *,
    error: type[PolymergeError] = CheckpointError,
    then: str = _AGAIN,
) -> T:
    """Convert parsed JSON to a value of `type`, as `msgspec.convert` does; the parameters are those of `parse_json`.

    Raises `error` with the member, the expected type and the actual value; Refused if several members are wrong.
    """
    try:
        return msgspec.convert(value, type)
    except UnicodeEncodeError:
        raise error(f"{where}: holds half of a surrogate pair, which is no character. {then}") from None
    except msgspec.ValidationError:
        found = list(dict.fromkeys(islice(_mismatches(value, type, ""), _MOST_LOOKED_AT)))
    problems = [error(f"{where}: {problem}. {then}") for problem in found[:_MOST_PROBLEMS]]
    if len(found) > _MOST_PROBLEMS:
        problems.append(error(f"{where}: {len(found) - _MOST_PROBLEMS} more problems like these. {then}"))
    raise problems[0] if len(problems) == 1 else Refused(problems)


def _whole(digits: str) -> int:
    if len(digits) > DIGITS + 1:  # with a sign
        raise ValueError(f"the number {shown(digits, 20)} has more than {DIGITS} digits")
    return int(digits)


def _deeper(value: Any) -> bool:
    """Return whether a value is nested more deeply than `NESTING` allows."""
    level = [value]
    for _ in range(NESTING):
        level = [one for one in level if isinstance(one, dict | list)]
        level = list(chain.from_iterable(one.values() if isinstance(one, dict) else one for one in level))
    return any(isinstance(one, dict | list) for one in level)


def _mismatches(value: Any, expected: Any, place: str) -> Iterator[str]:
    """Describe the type mismatch of every member of a value; msgspec itself stops at the first."""
    inside = list(_in_members(value, expected, place))
    yield from inside
    if not inside:
        try:
            msgspec.convert(value, expected)
        except msgspec.ValidationError as wrong:
            said, _, deeper = str(wrong).partition(" - at `$")
            if not deeper and not isinstance(value, list | dict):
                said = f"{said.partition(', got')[0]}, got {_shown(value)}"
            at = f"{place}{deeper.removesuffix('`')}".removeprefix(".")
            yield f"{at + ': ' if at else ''}{said[:1].lower()}{said[1:].replace('`', '')}"


def _in_members(value: Any, expected: Any, place: str) -> Iterator[str]:
    if get_origin(expected) is Annotated:
        expected = get_args(expected)[0]
    if get_origin(expected) in (Union, UnionType):  # the part of it that the value is meant for
        expected = next((one for one in get_args(expected) if _may_be(value, one)), expected)
    kind, arguments = get_origin(expected) or expected, get_args(expected)
    if isinstance(value, dict) and _is_struct(kind):
        for field in msgspec.structs.fields(kind):
            name = field.encode_name
            inner = f"{place}.{name}" if place else name
            if name in value:
                yield from _mismatches(value[name], field.type, inner)
            elif field.required:
                yield f"{inner} is missing"
    elif isinstance(value, dict) and kind is dict and arguments:
        for name, member in value.items():
            yield from _mismatches(member, arguments[1], f"{place}['{shown(name)}']")
    elif isinstance(value, list) and kind is list and arguments:
        for number, member in enumerate(value):
            yield from _mismatches(member, arguments[0], f"{place}[{number}]")


def _may_be(value: Any, expected: Any) -> bool:
    kind = get_origin(expected) or expected
    return isinstance(value, dict | list) and (kind is type(value) or (isinstance(value, dict) and _is_struct(kind)))


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _shown(value: object) -> str:
    return shown(json.dumps(value, ensure_ascii=False), _MOST_SHOWN)


def _not_utf8(wrong: UnicodeDecodeError) -> str:
    return f"is not UTF-8: byte {wrong.start} is 0x{wrong.object[wrong.start]:02x}"


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"{listed(twice)} appears twice in one object")
    return found


def strings_at(text: str) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """The positions of the strings in a JSON object's text: the keys that lead to each, its start and its end.

    text  JSON, as for `parse_json`; strings in arrays are skipped
    """
    path: list[str | None] = []  # the key of each object that is open, None for an array and what lies in one
    key: str | None = ""
    for token, following in pairwise(chain(_TOKEN.finditer(text), [None])):
        assert token is not None
        match token[0]:
            case "{" | "[":
                path.append(key if token[0] == "{" else None)
                key = None
            case "}" | "]":
                path.pop()
            case ",":
                key = None
            case ":":
                pass
            case string if following is not None and following[0] == ":":
                key = json.loads(string)
            case _ if key is not None and None not in path:
                yield (*filter(None, path), key), token.start(), token.end()
