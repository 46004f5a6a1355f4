"""Join vocabularies: which rows of the models' embeddings stand for the same token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from polymerge.checkpoint.arrivals import arrive
from polymerge.checkpoint.hubfiles import companions
from polymerge.checkpoint.tokens import read_tokens
from polymerge.errors import CheckpointError, PolymergeError
from polymerge.planning.model import EMBEDDING, Model
from polymerge.reads import Ranges

__all__ = ["TOKENIZER", "TokenJoin", "outside", "runs", "tokenizer_folder", "vocabulary_notes"]

TOKENIZER: Final = ("tokenizer.json", "vocab.json", "tokenizer.model", "added_tokens.json", "tokenizer_config.json")
"""The files that say which token a row is."""

_VOCABULARIES: Final = TOKENIZER[:3]


class TokenJoin:
    """Rows joined by token string; tokenizers are read when a vocabulary has to be joined, each once."""

    def __init__(self, template: Model, problems: list[PolymergeError]) -> None:
        self._template, self._problems = template, problems
        self._tokens: dict[Model, Mapping[int, str]] = {}

    def rows(self, total: int, readers: Sequence[Model], counts: Sequence[int]) -> list[Ranges]:
        """The template's rows whose token every reader has, in order, and each reader's rows for them.

        total, counts   rows of the template's tensor, and of each reader's
        """
        theirs = [self._places(model, count) for model, count in zip(readers, counts, strict=True)]
        joined = sorted(
            (number, *(known[token] for known in theirs))
            for token, number in self._places(self._template, total).items()
            if all(token in known for known in theirs)
        )
        columns = zip(*joined, strict=True) if joined else [()] * (len(readers) + 1)
        return [runs(column) for column in columns]

    def _places(self, model: Model, total: int) -> dict[str, int]:
        """The first of `total` rows that stands for each token."""
        found = sorted(self._of(model).items(), reverse=True)
        return {token: number for number, token in found if number < total}

    def _of(self, model: Model) -> Mapping[int, str]:
        if model not in self._tokens:
            try:
                self._tokens[model] = read_tokens(tokenizer_folder(model))
            except PolymergeError as error:
                self._problems.append(error)
                self._tokens[model] = {}
        return self._tokens[model]


def runs(numbers: Iterable[int]) -> Ranges:
    """Numbers as ranges, in their order: each as long as the numbers go on one by one."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return tuple(found)


def outside(rows: Ranges, total: int) -> Ranges:
    """The rows from 0 to `total` that do not lie in `rows`, which are in ascending order."""
    gaps, end = [], 0
    for start, stop in (*rows, (total, total)):
        if end < start:
            gaps.append((end, start))
        end = stop
    return tuple(gaps)


def tokenizer_folder(model: Model) -> Path:
    """Where the tokenizer of a model lies: beside its adapter where that has one, for it is the one trained with."""
    adapter = model.checkpoint.adapter
    own = adapter is not None and any((adapter.folder / name).exists() for name in _VOCABULARIES)
    return adapter.folder if adapter is not None and own else model.checkpoint.folder


def vocabulary_notes(model: Model) -> Iterator[str]:
    """What to say of a model whose adapter resized its vocabulary, or has a tokenizer that does not fit its rows."""
    own = next((name for name, held in model.layout.items() if held[0][0] == EMBEDDING), None)
    if model.checkpoint.adapter is None or own is None:
        return
    before, rows = model.entries[own].shape[0], model.shape(EMBEDDING)[0]
    folder = tokenizer_folder(model)
    if before != rows:
        yield f"'{model.label}': its adapter resized the vocabulary: {rows} rows, {before} in its base"
        if rows > before and folder == model.checkpoint.folder:
            yield (
                f"'{model.label}': no tokenizer lies beside the adapter, so that no token may have the new rows. Copy "
                "it there from where the adapter was trained"
            )
    if before == rows and folder == model.checkpoint.folder:
        return
    for file in companions(folder, TOKENIZER):
        arrive(file)
    if not any((folder / name).exists() for name in _VOCABULARIES):
        return
    try:
        last = max(read_tokens(folder), default=-1)
    except CheckpointError as error:
        yield f"'{model.label}': whether its tokens fit its rows is not checked: {error}"
        return
    if last >= rows:
        yield (
            f"'{model.label}': the tokenizer in {folder} has tokens up to number {last}, the embedding {rows} rows: "
            "the model fails at the tokens beyond them. Put the tokenizer that it was trained with beside the adapter"
        )
