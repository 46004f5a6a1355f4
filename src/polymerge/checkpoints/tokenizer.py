"""Which token each row of an embedding stands for, read from the tokenizer's files without a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from polymerge.errors import CheckpointError

__all__ = ["TOKENIZER", "read_tokens"]

TOKENIZER: Final = ("tokenizer.json", "vocab.json", "tokenizer.model", "added_tokens.json", "tokenizer_config.json")
"""The files that say which token a row is; one of the first three is needed."""


def read_tokens(folder: Path) -> dict[int, str]:
    """The token of each id that a checkpoint's tokenizer knows, from the first of these that is there.

    tokenizer.json; vocab.json with added_tokens.json; tokenizer.model (sentencepiece) with added_tokens.json. Added
    tokens of tokenizer_config.json complete the latter two.

    raises CheckpointError where there is none of them, or it cannot be read.
    """
    try:
        if (folder / "tokenizer.json").is_file():
            return _checked(_fast(_load(folder / "tokenizer.json")))
        if (folder / "vocab.json").is_file():
            tokens = {number: token for token, number in _load(folder / "vocab.json").items()}
        elif (folder / "tokenizer.model").is_file():
            tokens = dict(enumerate(_sentencepieces((folder / "tokenizer.model").read_bytes())))
        else:
            raise CheckpointError(
                f"{folder}: no tokenizer.json, vocab.json or tokenizer.model, so nothing says which token a row of the "
                "embedding is. Add the tokenizer, or use vocab: template"
            )
        if (folder / "added_tokens.json").is_file():
            tokens |= {number: token for token, number in _load(folder / "added_tokens.json").items()}
        if (folder / "tokenizer_config.json").is_file():
            added = _load(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
            tokens |= {int(number): entry["content"] for number, entry in added.items()}
        return _checked(tokens)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{folder}: its tokenizer cannot be read: {error!r}") from None


def _checked(tokens: dict[Any, Any]) -> dict[int, str]:
    """Files of other people hold anything: only whole numbers with text are tokens."""
    for number, token in tokens.items():
        if not isinstance(number, int) or not isinstance(token, str):
            raise ValueError(f"{token!r} as number {number!r} is not a token")
    return tokens


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _fast(data: Mapping[str, Any]) -> dict[int, str]:
    """The tokens of a tokenizer.json: a mapping of tokens to ids, or a list of tokens with their scores."""
    vocabulary = data["model"]["vocab"]
    if isinstance(vocabulary, Mapping):
        tokens = {number: token for token, number in vocabulary.items()}
    else:
        tokens = {number: entry[0] for number, entry in enumerate(vocabulary)}
    return tokens | {entry["id"]: entry["content"] for entry in data.get("added_tokens", ())}


def _sentencepieces(data: bytes) -> Iterator[str]:
    """The pieces of a sentencepiece model: field 1 of its protocol buffer, each with its text in field 1."""
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            texts = [text for field, text in _fields(value) if field == 1 and isinstance(text, bytes)]
            if not texts:
                raise ValueError("a piece has no text")
            yield texts[-1].decode()


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol buffer: number and value, bytes where the field has a length."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, place = _varint(data, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"unknown wire type {kind}")
        if place + size > len(data):
            raise ValueError("it ends early")
        yield tag >> 3, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
