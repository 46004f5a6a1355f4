"""The tokens of each model: which row of its embedding stands for which, read from its tokenizer once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from polymerge.checkpoints.bounds import TOKENIZER_BYTES, read_bounded
from polymerge.checkpoints.hub import companions, listed_alike
from polymerge.checkpoints.prefetch import fetched
from polymerge.checkpoints.tokenizer import TOKENIZER, read_tokens
from polymerge.errors import PolymergeError, refuse
from polymerge.planning.companions import tokenizer_folder
from polymerge.planning.model import Model

__all__ = ["Tokens", "says_tokens", "tokens_in"]

_VOCABULARIES: Final = TOKENIZER[:3]

_MARKS: Final = ("Ġ", "▁", "##")
"""What tokenizers mark the begin of a word by, or (##) that it goes on: of bytes, sentencepiece and WordPiece."""

_SHARE: Final = 20
"""One token in so many has to have a mark for it to be the tokenizer's own."""


class Tokens:
    """Reads the tokens of models; each tokenizer is read at most once."""

    def __init__(self) -> None:
        self._found: dict[Model, Mapping[int, str] | PolymergeError] = {}

    def of(self, model: Model) -> Mapping[int, str]:
        """A model's tokens by row; empty if they cannot be read, which is refused."""
        try:
            return self.read(model)
        except PolymergeError as error:
            refuse(error)
            return {}

    def read(self, model: Model) -> Mapping[int, str]:
        """A model's tokens by row; raises PolymergeError if they cannot be read."""
        if model not in self._found:
            try:
                self._found[model] = tokens_in(tokenizer_folder(model.checkpoint))
            except PolymergeError as error:
                self._found[model] = error
        found = self._found[model]
        if isinstance(found, PolymergeError):
            raise found
        return found

    def places(self, model: Model, total: int) -> dict[str, int]:
        """The first of `total` rows for each token."""
        return first_rows(self.of(model), total)

    def same_file(self, one: Model, other: Model) -> bool:
        """Return whether the tokenizer.json of two models are equal byte for byte, so that neither need be read."""
        if one is other:
            return True
        ours, theirs = (tokenizer_folder(model.checkpoint) / TOKENIZER[0] for model in (one, other))
        try:
            if listed_alike(ours, theirs):
                return True
            if ours.stat().st_size != theirs.stat().st_size:
                return False
            return read_bounded(ours, TOKENIZER_BYTES) == read_bounded(theirs, TOKENIZER_BYTES)
        except OSError:
            return False  # one has none, or what is wrong with it is said when it is read

    def kind(self, model: Model) -> str:
        """The mark of a tokenizer's kind, such as `Ġ` where it is of bytes; empty if its tokens have none."""
        tokens = self.of(model).values()
        counts = {mark: sum(token.startswith(mark) for token in tokens) for mark in _MARKS}
        mark = max(counts, key=lambda one: counts[one])
        return mark if counts[mark] * _SHARE > len(tokens) else ""


def first_rows(tokens: Mapping[int, str], total: int) -> dict[str, int]:
    """The first of `total` rows for each token."""
    return {token: number for number, token in sorted(tokens.items(), reverse=True) if number < total}


def says_tokens(folder: Path) -> bool:
    """Return whether a folder has a file that maps rows to tokens, locally or still on the hub."""
    return any((folder / name).is_file() or (folder / name).is_symlink() for name in _VOCABULARIES)


def tokens_in(folder: Path) -> Mapping[int, str]:
    """The token of each row, from the files of a folder, downloaded if they are on the hub."""
    fetch_tokenizers([folder])
    return read_tokens(folder)


def fetch_tokenizers(folders: Iterable[Path]) -> None:
    """Download the files of tokenizers that map rows to tokens, if they are on the hub."""
    for folder in folders:
        for file in companions(folder, TOKENIZER):
            fetched(file)
