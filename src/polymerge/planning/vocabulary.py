"""Join vocabularies: match the rows of the models' embeddings that stand for the same token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from polymerge.checkpoints.bounds import TOKENIZER_BYTES, read_bounded
from polymerge.checkpoints.hub import companions, listed_alike, missing_remote
from polymerge.checkpoints.prefetch import fetched
from polymerge.checkpoints.tokenizer import TOKENIZER, read_tokens
from polymerge.errors import PolymergeError, refuse
from polymerge.families import text_tower
from polymerge.families.expressions import Ranges
from polymerge.planning.companions import tokenizer_folder
from polymerge.planning.model import EMBEDDING, HEAD, VOCABULARY, Model
from polymerge.recipe.recipe import Vocab

__all__ = ["Taken", "Vocabularies", "outside", "runs", "vocabulary_notes"]

_VOCABULARIES: Final = TOKENIZER[:3]

_SHOWN: Final = 2
"""Number of mismatched rows that a warning shows."""


@dataclass(frozen=True)
class Taken:
    """The rows of a vocabulary that are merged.

    rows     rows of the template's tensor
    theirs   each reader's rows that are merged into them, in the same order
    rest     rows of the template's tensor that stay unchanged
    reason   the plan's reason for rows left out on either side
    """

    rows: Ranges
    theirs: tuple[Ranges, ...]
    rest: Ranges
    reason: str


class Vocabularies:
    """Matches vocabulary rows and collects warnings; each tokenizer is read at most once.

    vocab   as in the recipe: template, overlap or by-token
    """

    def __init__(self, template: Model, vocab: Vocab) -> None:
        self._template, self._vocab = template, vocab
        self._tokens: dict[Model, Mapping[int, str] | PolymergeError] = {}
        # what is merged row by row, or kept since rows do not agree: names of tensors by model and number of rows
        self._by_number: dict[tuple[Model, int], list[str]] = defaultdict(list)
        self._unequal: dict[tuple[Model, int, int], list[str]] = defaultdict(list)

    def taken(self, canonical: str, total: int, readers: Sequence[Model], counts: Sequence[int]) -> Taken | None:
        """The merged rows of a vocabulary tensor; None if the vocabularies differ and it is kept.

        total, counts   rows of the template's tensor, and of each reader's
        """
        if self._vocab == "by-token":
            rows, *theirs = self._joined(total, readers, counts)
        elif set(counts) == {total} or self._vocab == "overlap":
            rows = ((0, min(total, *counts)),)
            theirs = [rows] * len(readers)
        else:
            other, count = next(pair for pair in zip(readers, counts, strict=True) if pair[1] != total)
            self._unequal[other, count, total].append(canonical)
            return None
        rest = outside(rows, total)
        kept = ", ".join(f"{start} to {stop}" for start, stop in rest[:3]) + (", ..." if len(rest) > 3 else "")
        reasons = [f"rows {kept} are the template's"] if rest else []
        for model, part, count in zip(readers, theirs, counts, strict=True):
            unread = count - sum(stop - start for start, stop in part)
            if unread and model is not self._template:
                reasons.append(f"{unread} of the {count} rows of '{model.label}' are not read")
        return Taken(rows, tuple(theirs), rest, "; ".join(dict.fromkeys(reasons)))

    def note(self, canonical: str, total: int, readers: Sequence[Model], counts: Sequence[int]) -> None:
        """Record a merged tensor for `warnings`: vocabulary rows are joined by index unless joined by token."""
        if self._vocab == "by-token" or not self._is_vocabulary(canonical):
            return
        for model in readers:
            if model is not self._template:
                self._by_number[model, min(total, *counts)].append(canonical)

    def _is_vocabulary(self, canonical: str) -> bool:
        """Return whether a tensor's rows are the vocabulary: by its name, or its height if names carry no meaning."""
        if not self._template.generic:
            return canonical in VOCABULARY
        shape = self._template.shape(canonical)
        return len(shape) == 2 and shape[0] == text_tower(self._template.checkpoint.config).vocab_size

    def warnings(self) -> Iterator[str]:
        """Sentences on vocabularies that differ, and on rows merged by index that stand for different tokens."""
        for (model, count, total), names in self._unequal.items():
            yield (
                f"{' and '.join(dict.fromkeys(names))}: '{model.label}' has {count} rows, template "
                f"'{self._template.label}' {total}: vocabularies differ, so the template's is kept (vocab: overlap or "
                "by-token merges)"
            )
        alike: dict[tuple[int, tuple[str, ...]], list[Model]] = defaultdict(list)
        for (model, count), names in self._by_number.items():
            alike[count, tuple(dict.fromkeys(names))].append(model)
        for (count, merged), models in alike.items():
            yield from self._unlike(models, count, merged)

    def _joined(self, total: int, readers: Sequence[Model], counts: Sequence[int]) -> list[Ranges]:
        """The template's rows whose token every reader has, in order, and each reader's rows for these tokens."""
        theirs = [self._places(model, count) for model, count in zip(readers, counts, strict=True)]
        joined = sorted(
            (number, *(known[token] for known in theirs))
            for token, number in self._places(self._template, total).items()
            if all(token in known for known in theirs)
        )
        columns = zip(*joined, strict=True) if joined else [()] * (len(readers) + 1)
        return [runs(column) for column in columns]

    def _unlike(self, models: Sequence[Model], rows: int, names: Sequence[str]) -> Iterator[str]:
        """A warning if the first `rows` rows of `names`, merged by index, stand for other tokens in some models.

        Models that differ from the template in the same way share one; models without a tokenizer are skipped.
        """
        merged = f"the rows of {' and '.join(names)} are merged by number"
        alike: dict[tuple[int, str], list[str]] = {}
        for model in models:
            try:
                folders = [tokenizer_folder(one.checkpoint) for one in (self._template, model)]
                if not all(map(_says_tokens, folders)) or self._same_file(model):
                    continue
                ours, theirs = self._read(self._template), self._read(model)
            except PolymergeError as error:
                yield (
                    f"{merged}, and whether they stand for the same tokens in '{model.label}' was not compared: {error}"
                )
                continue
            both = [(row, ours.get(row), theirs.get(row)) for row in range(rows)]
            others = [(row, one, other) for row, one, other in both if one != other and None not in (one, other)]
            single = [(row, one, other) for row, one, other in both if (one is None) != (other is None)]
            if not others and not single:
                continue
            count = len(others) + len(single)
            shown = ", ".join(f"{row}: {_token(one)}/{_token(other)}" for row, one, other in (others + single)[:_SHOWN])
            told = f", {len(single)} of them for one in one of the two alone" if single and others else ""
            said = f"{told} ({shown}{', ...' if count > _SHOWN else ''})"
            alike.setdefault((count, said), []).append(f"'{model.label}'")
        for (count, said), labels in alike.items():
            yield (
                f"{merged}, but {count} of {rows} rows do not stand for one token in template '{self._template.label}' "
                f"and in {' and '.join(labels)}{said}. Say vocab: by-token to join rows by "
                "their token, or name these tensors in exclude"
            )

    def _places(self, model: Model, total: int) -> dict[str, int]:
        """The first of `total` rows for each token."""
        found = sorted(self._of(model).items(), reverse=True)
        return {token: number for number, token in found if number < total}

    def _of(self, model: Model) -> Mapping[int, str]:
        """A model's tokens by row; empty if they cannot be read, which is refused."""
        try:
            return self._read(model)
        except PolymergeError as error:
            refuse(error)
            return {}

    def _read(self, model: Model) -> Mapping[int, str]:
        if model not in self._tokens:
            try:
                self._tokens[model] = _tokens_in(tokenizer_folder(model.checkpoint))
            except PolymergeError as error:
                self._tokens[model] = error
        found = self._tokens[model]
        if isinstance(found, PolymergeError):
            raise found
        return found

    def _same_file(self, model: Model) -> bool:
        """Return whether a model's tokenizer.json equals the template's byte for byte, so that neither need be read."""
        ours, theirs = (tokenizer_folder(one.checkpoint) / TOKENIZER[0] for one in (self._template, model))
        try:
            if listed_alike(ours, theirs):
                return True
            if ours.stat().st_size != theirs.stat().st_size:
                return False
            return read_bounded(ours, TOKENIZER_BYTES) == read_bounded(theirs, TOKENIZER_BYTES)
        except OSError:
            return False  # one has none, or what is wrong with it is said when it is read


def _says_tokens(folder: Path) -> bool:
    """Return whether a folder has a file that maps rows to tokens, locally or still on the hub."""
    return any((folder / name).is_file() or (folder / name).is_symlink() for name in _VOCABULARIES)


def _tokens_in(folder: Path) -> Mapping[int, str]:
    """The token of each row, from the files of a folder, downloaded if they are on the hub."""
    for file in companions(folder, TOKENIZER):
        fetched(file)
    return read_tokens(folder)


def _token(token: str | None) -> str:
    return "none" if token is None else repr(token)


def runs(numbers: Iterable[int]) -> Ranges:
    """Ranges of consecutive numbers, in the order given."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return tuple(found)


def outside(rows: Ranges, total: int) -> Ranges:
    """The rows from 0 to `total` that are not in `rows`, which ascend."""
    gaps, end = [], 0
    for start, stop in (*rows, (total, total)):
        if end < start:
            gaps.append((end, start))
        end = stop
    return tuple(gaps)


def vocabulary_notes(model: Model) -> Iterator[str]:
    """Sentences on a model whose adapter resized its vocabulary, or whose tokenizer does not fit its rows."""
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
    files = companions(folder, TOKENIZER)
    if before == rows and (folder == model.checkpoint.folder or any(map(missing_remote, files))):
        return  # a tokenizer on the hub takes megabytes, which no mere doubt is worth
    if not _says_tokens(folder):
        return
    try:
        last = max(_tokens_in(folder), default=-1)
    except PolymergeError as error:
        yield f"'{model.label}': whether its tokens fit its rows is not checked: {error}"
        return
    if last >= rows:
        yield (
            f"'{model.label}': the tokenizer in {folder} has tokens up to number {last}, the embedding {rows} rows: "
            "the model fails at the tokens beyond them. Put the tokenizer that it was trained with beside the adapter"
        )
