"""JSON objects as checkpoints hold them: configs, indexes and safetensors headers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from polymerge.checkpoints.tensor_info import listed
from polymerge.errors import CheckpointError

__all__ = ["parse_object", "strings_at"]

_TOKEN: Final = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]')


def parse_object(text: bytes, where: str, *, unique_keys: bool = True) -> dict[str, Any]:
    """The JSON object that `text` is; `where` names it in messages.

    With `unique_keys`, a key that appears twice in one object is refused: readers differ on which of the two
    counts, so the same file would hold different tensors for different programs.

    Raises CheckpointError with line and column where `text` is not UTF-8 or not JSON, and where it is no object.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates if unique_keys else None)
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{where} is not UTF-8: byte {error.start} is 0x{text[error.start]:02x}. Download it again."
        ) from None
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{where} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}. Download it again."
        ) from None
    except RecursionError:
        raise CheckpointError(f"{where} is nested too deeply to be read. Download it again.") from None
    except ValueError as error:  # duplicate keys, and numbers with thousands of digits
        raise CheckpointError(f"{where} cannot be read: {error}. Ask its author to correct it.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is a JSON {_KINDS[type(value)]}, not an object. Download it again.")
    return value


_KINDS = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    "".join(found).encode()  # half a surrogate pair can be neither printed nor written again: ValueError
    if len(found) != len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"{listed(twice)} appears twice in one object")
    return found


def strings_at(text: str) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """Where the strings of a JSON object stand in its text: the keys that lead to each, its first place and its end.

    text  JSON, as `parse_object` takes it; what lies in arrays has no such keys and is passed over
    """
    path: list[str | None] = []  # the key of each object that is open, None for an array and what lies in one
    key: str | None = ""
    tokens = list(_TOKEN.finditer(text))
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
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
