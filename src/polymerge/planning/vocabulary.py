"""Join vocabularies: which rows of the models' embeddings stand for the same token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from polymerge.checkpoint.tokens import read_tokens
from polymerge.errors import PolymergeError
from polymerge.planning.companions import tokenizer_folder
from polymerge.planning.model import Model
from polymerge.reads import Ranges

__all__ = ["TokenJoin", "outside", "runs"]


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
                self._tokens[model] = read_tokens(tokenizer_folder(model.checkpoint))
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
