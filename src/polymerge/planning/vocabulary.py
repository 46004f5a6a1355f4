"""Join vocabularies: which rows of the models' embeddings stand for the same token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from polymerge.checkpoint.hubfiles import companions, listed_alike
from polymerge.checkpoint.prefetch import fetched
from polymerge.checkpoint.tokens import TOKENIZER, read_tokens
from polymerge.errors import CheckpointError, PolymergeError
from polymerge.planning.companions import tokenizer_folder
from polymerge.planning.model import EMBEDDING, HEAD, Model
from polymerge.reads import Ranges

__all__ = ["TokenJoin", "outside", "runs", "vocabulary_notes"]

_VOCABULARIES: Final = TOKENIZER[:3]

_SHOWN: Final = 2
"""Rows that stand for other tokens that a warning shows."""


class TokenJoin:
    """Rows joined by token string; tokenizers are read when a vocabulary is merged, each once."""

    def __init__(self, template: Model, problems: list[PolymergeError]) -> None:
        self._template, self._problems = template, problems
        self._tokens: dict[Model, Mapping[int, str] | PolymergeError] = {}

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

    def unlike(self, model: Model, rows: int, names: Sequence[str]) -> str | None:
        """A warning where the first `rows` rows of `names`, merged by number, stand for other tokens in a model.

        Nothing is said where a model has no tokenizer.
        """
        merged = f"the rows of {' and '.join(names)} are merged by number"
        try:
            if not _has_tokenizer(model) or not _has_tokenizer(self._template) or self._same_file(model):
                return None
            ours, theirs = self._read(self._template), self._read(model)
        except PolymergeError as error:
            return f"{merged}, and whether they stand for the same tokens in '{model.label}' was not compared: {error}"
        both = [(row, ours.get(row), theirs.get(row)) for row in range(rows)]
        others = [(row, one, other) for row, one, other in both if one != other and None not in (one, other)]
        single = [(row, one, other) for row, one, other in both if (one is None) != (other is None)]
        if not others and not single:
            return None
        label, count = self._template.label, len(others) + len(single)
        shown = ", ".join(f"{row}: {_token(one)}/{_token(other)}" for row, one, other in (others + single)[:_SHOWN])
        told = f", {len(single)} of them for one in one of the two alone" if single and others else ""
        return (
            f"{merged}, but {count} of {rows} rows do not stand for one token in template '{label}' and in "
            f"'{model.label}'{told} ({shown}{', ...' if count > _SHOWN else ''}). Say vocab: by-token to join rows by "
            "their token, or name these tensors in exclude"
        )

    def _places(self, model: Model, total: int) -> dict[str, int]:
        """The first of `total` rows that stands for each token."""
        found = sorted(self._of(model).items(), reverse=True)
        return {token: number for number, token in found if number < total}

    def _of(self, model: Model) -> Mapping[int, str]:
        """Its tokens, or none with the problem said."""
        try:
            return self._read(model)
        except PolymergeError as error:
            if error not in self._problems:
                self._problems.append(error)
            return {}

    def _read(self, model: Model) -> Mapping[int, str]:
        if model not in self._tokens:
            try:
                folder = tokenizer_folder(model.checkpoint)
                for file in companions(folder, TOKENIZER):
                    fetched(file)
                self._tokens[model] = read_tokens(folder)
            except PolymergeError as error:
                self._tokens[model] = error
        found = self._tokens[model]
        if isinstance(found, PolymergeError):
            raise found
        return found

    def _same_file(self, model: Model) -> bool:
        """Whether a model's tokenizer.json is the template's byte for byte, which spares reading either."""
        ours, theirs = (tokenizer_folder(one.checkpoint) / TOKENIZER[0] for one in (self._template, model))
        try:
            if listed_alike(ours, theirs):
                return True
            return ours.stat().st_size == theirs.stat().st_size and ours.read_bytes() == theirs.read_bytes()
        except OSError:
            return False  # one has none, or what is wrong with it is said when it is read


def _has_tokenizer(model: Model) -> bool:
    folder = tokenizer_folder(model.checkpoint)
    return bool(companions(folder, TOKENIZER[:3])) or any((folder / name).is_file() for name in TOKENIZER[:3])


def _token(token: str | None) -> str:
    return "none" if token is None else repr(token)


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


def vocabulary_notes(model: Model) -> Iterator[str]:
    """What to say of a model whose adapter resized its vocabulary, or has a tokenizer that does not fit its rows."""
    names = {held[0][0]: name for name, held in model.layout.items() if name in model.entries}
    canonical = next((one for one in (EMBEDDING, HEAD) if one in names), None)  # a tied one may be stored as either
    if model.checkpoint.adapter is None or canonical is None:
        return
    before, rows = model.entries[names[canonical]].shape[0], model.shape(canonical)[0]
    folder = tokenizer_folder(model.checkpoint)
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
        fetched(file)
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
