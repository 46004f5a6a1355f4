"""The token of each embedding row, read from the tokenizer's files without a tokenizer library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from polymerge.checkpoints.bounds import TOKENIZER_BYTES, read_bounded
from polymerge.errors import CheckpointError, MissingExtraError

__all__ = ["TOKENIZER", "AddedToken", "read_added", "read_tokens"]

T = TypeVar("T")

TOKENIZER: Final = ("tokenizer.json", "vocab.json", "tokenizer.model", "added_tokens.json", "tokenizer_config.json")
"""Files that map rows to tokens; one of the first three is needed."""


@dataclass(frozen=True)
class AddedToken:
    """A token beside those of the tokenizer's own model: it is found in a text literally, before that is split.

    special, single_word, lstrip, rstrip, normalized   as in the library tokenizers
    """

    id: int
    content: str
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]]
    """Tokens with their ids, or in order with their scores."""


class _Fast(msgspec.Struct):
    """tokenizer.json."""

    model: _Model
    added_tokens: list[AddedToken] = []


class _Added(msgspec.Struct):
    """tokenizer.json, of which only the added tokens are wanted."""

    added_tokens: list[AddedToken] = []


class _Slow(msgspec.Struct):
    """tokenizer_config.json."""

    added_tokens_decoder: dict[int, dict[str, Any]] = {}


def read_tokens(folder: Path) -> dict[int, str]:
    """Read the token of each id of a checkpoint's tokenizer, from the first of these that exists.

    tokenizer.json; vocab.json with added_tokens.json; tokenizer.model (sentencepiece) with added_tokens.json. Added
    tokens of tokenizer_config.json complete the latter two.

    raises CheckpointError if there is none of them, or it cannot be read, MissingExtraError if tokenizer.model
    has to be read and sentencepiece is not installed.
    """
    if (folder / "tokenizer.json").is_file():
        fast = _load(folder / "tokenizer.json", _Fast)
        vocabulary = fast.model.vocab
        if isinstance(vocabulary, dict):
            tokens = _by_id(vocabulary)
        else:
            tokens = {number: token for number, (token, _) in enumerate(vocabulary)}
        return tokens | {added.id: added.content for added in fast.added_tokens}
    if (folder / "vocab.json").is_file():
        tokens = _by_id(_load(folder / "vocab.json", dict[str, int]))
    elif (folder / "tokenizer.model").is_file():
        tokens = _sentencepieces(folder / "tokenizer.model")
    else:
        raise CheckpointError(
            f"{folder}: no tokenizer.json, vocab.json or tokenizer.model, so it is unknown which token a row of the "
            "embedding stands for. Add the tokenizer, or use vocab: template"
        )
    return tokens | {added.id: added.content for added in _added_beside(folder)}


def read_added(folder: Path) -> list[AddedToken]:
    """Read the added tokens of a checkpoint's tokenizer, by the same files as `read_tokens`, in the order of their ids.

    raises CheckpointError if they cannot be read.
    """
    if (folder / "tokenizer.json").is_file():
        return sorted(_load(folder / "tokenizer.json", _Added).added_tokens, key=lambda added: added.id)
    return _added_beside(folder)


def _added_beside(folder: Path) -> list[AddedToken]:
    """The added tokens of a tokenizer without tokenizer.json; what tokenizer_config.json says of one prevails."""
    found: dict[int, AddedToken] = {}
    if (folder / "added_tokens.json").is_file():
        listed = _load(folder / "added_tokens.json", dict[str, int])
        found = {number: AddedToken(number, token) for token, number in listed.items()}
    if (file := folder / "tokenizer_config.json").is_file():
        for number, said in _load(file, _Slow).added_tokens_decoder.items():
            try:
                found[number] = msgspec.convert({**said, "id": number}, AddedToken)
            except msgspec.ValidationError as error:
                raise _unreadable(file, error) from None
    return [found[number] for number in sorted(found)]


def _by_id(vocabulary: dict[str, int]) -> dict[int, str]:
    return {number: token for token, number in vocabulary.items()}


def _load(file: Path, type: type[T]) -> T:  # noqa: A002 (msgspec's name for it)
    # decoded as what is needed of it: the merges of a tokenizer.json take most of it and are passed over
    try:
        return msgspec.json.decode(read_bounded(file, TOKENIZER_BYTES), type=type)
    except (OSError, RecursionError, ValueError, msgspec.DecodeError) as error:
        raise _unreadable(file, error) from None


def _sentencepieces(file: Path) -> dict[int, str]:
    """The pieces of a sentencepiece model by their ids."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise MissingExtraError(
            f"{file}: reading it needs sentencepiece: pip install 'polymerge[transformers]', or use vocab: template"
        ) from None
    try:
        model = read_bounded(file, TOKENIZER_BYTES)
        if not model:
            raise ValueError("it is empty")
        processor: Any = SentencePieceProcessor(model_proto=model)
        return {number: processor.IdToPiece(number) for number in range(processor.GetPieceSize())}
    except (OSError, RuntimeError, ValueError) as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file.parent}: its tokenizer cannot be read: {file.name}: {error}")
