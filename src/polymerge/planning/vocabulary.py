"""Join vocabularies: match the rows of the models' embeddings that stand for the same token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from polymerge.checkpoints.hub import companions, missing_remote
from polymerge.checkpoints.tokenizer import TOKENIZER
from polymerge.errors import PolymergeError, RecipeError, refuse
from polymerge.families import text_tower
from polymerge.families.expressions import Concat, Expr, Mean, Ranges, rows_of
from polymerge.families.lent import of_input
from polymerge.planning.companions import tokenizer_folder
from polymerge.planning.model import EMBEDDING, HEAD, VOCABULARY, Model
from polymerge.planning.tokenizer_source import OutputVocabulary
from polymerge.planning.tokens import Tokens, says_tokens, tokens_in
from polymerge.recipe.recipe import Vocab

__all__ = ["Taken", "Vocabularies", "outside", "runs", "vocabulary_notes"]

_SHOWN: Final = 2
"""Number of mismatched rows that a warning shows."""


@dataclass
class _Block:
    """Rows that come from rows of one model, `count` from its start on, or are the mean of such rows of several."""

    models: tuple[Model, ...]
    starts: tuple[int, ...]
    count: int = 1

    @property
    def ends(self) -> tuple[int, ...]:
        """The row that would come next in each model."""
        return tuple(start + self.count for start in self.starts)


@dataclass(frozen=True)
class Taken:
    """The rows of a vocabulary that are merged.

    rows     rows of the output's tensor
    reads    the expression for each reader's rows that are merged into them, in the same order
    rest     rows of the output's tensor that stay as `keeper` has them
    reason   the plan's reason for rows left out on either side, and for those that another model lends
    """

    rows: Ranges
    reads: tuple[Expr, ...]
    rest: Ranges
    keeper: Model
    reason: str


class Vocabularies:
    """Matches vocabulary rows and collects warnings.

    vocab    as in the recipe: template, overlap or by-token
    chosen   the vocabulary that the recipe chooses for the output by tokenizer_source, if it does
    inputs   every model that the plan reads, in the plan's order
    base     the one whose rows those lack that another model has, of several that have them
    """

    def __init__(
        self,
        vocab: Vocab,
        tokens: Tokens,
        chosen: OutputVocabulary | None,
        inputs: Sequence[Model],
        base: Model | None,
    ) -> None:
        self._template, self._vocab, self._tokens = inputs[0], vocab, tokens
        self._chosen = chosen if chosen is not None and not chosen.agrees else None
        self._inputs, self._base = inputs, base
        self.filled: dict[str, dict[str, int]] = {}
        self._known: dict[Hashable, tuple[Ranges, dict[Model, list[_Block]]]] = {}
        # what is merged row by row, or kept since rows do not agree: names of tensors by model and number of rows
        self._by_number: dict[tuple[Model, int], list[str]] = defaultdict(list)
        self._unequal: dict[tuple[Model, int, int], list[str]] = defaultdict(list)

    def rows(self, canonical: str, total: int) -> int:
        """The rows of the output's tensor, of which the template's has `total`."""
        if self._chosen is None or canonical not in VOCABULARY:
            return total
        return self._chosen.rows(canonical, total)

    def changes(self, canonical: str) -> bool:
        """Return whether the template's rows of a tensor are not those of the output, so that it cannot be kept."""
        return self._chosen is not None and canonical in VOCABULARY and self._chosen.changes

    def taken(self, canonical: str, total: int, readers: Sequence[Model], counts: Sequence[int]) -> Taken | None:
        """The merged rows of a vocabulary tensor; None if the vocabularies differ and it is kept.

        total, counts   rows of the output's tensor, and of each reader's
        """
        if self._chosen is not None:
            return self._filled_in(self._chosen, canonical, total, readers, counts)
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
        reasons = [_kept(rest, "template")] if rest else []
        for model, part, count in zip(readers, theirs, counts, strict=True):
            unread = count - sum(stop - start for start, stop in part)
            if unread and model is not self._template:
                reasons.append(f"{unread} of the {count} rows of '{model.label}' are not read")
        reads = tuple(_own_rows(model, canonical, part) for model, part in zip(readers, theirs, strict=True))
        return Taken(rows, reads, rest, self._template, "; ".join(dict.fromkeys(reasons)))

    def _filled_in(
        self, chosen: OutputVocabulary, canonical: str, total: int, readers: Sequence[Model], counts: Sequence[int]
    ) -> Taken:
        """Every row of the output whose token a reader has, with rows of others for the readers that lack it.

        As in mergekit those are the base's, else the mean of all that have the token.
        """
        merged, lent = self._lent(chosen, total, readers, counts)
        rest, keeper, reasons = outside(merged, total), chosen.keeper, []
        found = keeper.find(canonical)
        own = keeper.shape(found)[0] if found is not None else 0
        if rest and rest[-1][1] > own:
            refuse(
                RecipeError(
                    f"tokenizer_source: {chosen.source}: {canonical} has {total} rows in the output, and no model has "
                    f"a row for number {rest[-1][1] - 1}: '{keeper.label}' has {own}"
                )
            )
        if rest:
            reasons.append(_kept(rest, "template" if keeper is self._template else f"'{keeper.label}'"))
        filled = {model.label: _counted(model, blocks) for model, blocks in lent.items()}
        for label, lenders in filled.items():
            reasons += [f"{count} rows of '{label}' are {whose}" for whose, count in lenders.items()]
        if canonical == EMBEDDING or not self.filled:
            self.filled = {label: lenders for label, lenders in filled.items() if lenders}
        reads = {model: self._expr(model, canonical, blocks) for model, blocks in lent.items() if blocks}
        return Taken(merged, tuple(reads[model] for model in readers if reads), rest, keeper, "; ".join(reasons))

    def _lent(
        self, chosen: OutputVocabulary, total: int, readers: Sequence[Model], counts: Sequence[int]
    ) -> tuple[Ranges, dict[Model, list[_Block]]]:
        """The rows of the output whose token a reader has, and for each reader the blocks that they are read from."""
        key = (total, tuple(readers), tuple(counts))
        if key in self._known:
            return self._known[key]
        held = {model: self._tokens.places(model, count) for model, count in zip(readers, counts, strict=True)}
        lent: dict[Model, list[_Block]] = {model: [] for model in held}
        rows: list[int] = []
        for token, row in sorted(chosen.places(total).items(), key=lambda one: one[1]):
            having = {model: places[token] for model, places in held.items() if token in places}
            if not having:
                continue
            rows.append(row)
            base = having.get(self._base) if self._base is not None else None
            lenders = having if base is None or self._base is None else {self._base: base}
            for model, blocks in lent.items():
                _extend(blocks, {model: having[model]} if model in having else lenders)
        self._known[key] = runs(rows), lent
        return self._known[key]

    def _expr(self, reader: Model, canonical: str, blocks: Sequence[_Block]) -> Expr:
        """The expression for rows of a reader, some of which are another's, or the mean of others'."""
        found: list[Expr] = []
        for block in blocks:
            parts = []
            for model, start in zip(block.models, block.starts, strict=True):
                own = _own_rows(model, canonical, ((start, start + block.count),))
                parts.append(own if model is reader else of_input(own, self._inputs.index(model)))
            found.append(parts[0] if len(parts) == 1 else Mean(tuple(parts)))
        return found[0] if len(found) == 1 else Concat(tuple(found))

    def note(self, canonical: str, total: int, readers: Sequence[Model], counts: Sequence[int]) -> None:
        """Record a merged tensor for `warnings`: vocabulary rows are joined by index unless joined by token."""
        if self._vocab == "by-token" or self._chosen is not None or not self._is_vocabulary(canonical):
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
        theirs = [self._tokens.places(model, count) for model, count in zip(readers, counts, strict=True)]
        joined = sorted(
            (number, *(known[token] for known in theirs))
            for token, number in self._tokens.places(self._template, total).items()
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
                if not all(map(says_tokens, folders)) or self._tokens.same_file(self._template, model):
                    continue
                ours, theirs = self._tokens.read(self._template), self._tokens.read(model)
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


def _own_rows(model: Model, canonical: str, rows: Ranges) -> Expr:
    """The expression for rows of a model's tensor; for all of them that of the tensor."""
    name = model.find(canonical) or canonical
    expr, shape = model.tensors[name], model.shape(name)
    return expr if rows == ((0, shape[0] if shape else 1),) else rows_of(expr, rows)


def _extend(blocks: list[_Block], origin: Mapping[Model, int]) -> None:
    """Add one row, which is this one of a model, or the mean of these of several."""
    last, models, rows = blocks[-1] if blocks else None, tuple(origin), tuple(origin.values())
    if last is not None and last.models == models and last.ends == rows:
        last.count += 1
    else:
        blocks.append(_Block(models, rows))


def _counted(reader: Model, blocks: Iterable[_Block]) -> dict[str, int]:
    """How many rows of a reader others lend, by the words for these."""
    lent: dict[str, int] = defaultdict(int)
    for block in blocks:
        if block.models != (reader,):
            labels = " and ".join(f"'{model.label}'" for model in block.models)
            lent[f"the mean of {labels}" if block.models[1:] else f"of {labels}"] += block.count
    return dict(lent)


def _kept(rest: Ranges, whose: str) -> str:
    """The reason for rows that are not merged."""
    kept = ", ".join(f"{start} to {stop}" for start, stop in rest[:3]) + (", ..." if len(rest) > 3 else "")
    return f"rows {kept} are " + ("the template's" if whose == "template" else f"of {whose}")


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
    if not says_tokens(folder):
        return
    try:
        last = max(tokens_in(folder), default=-1)
    except PolymergeError as error:
        yield f"'{model.label}': whether its tokens fit its rows is not checked: {error}"
        return
    if last >= rows:
        yield (
            f"'{model.label}': the tokenizer in {folder} has tokens up to number {last}, the embedding {rows} rows: "
            "the model fails at the tokens beyond them. Put the tokenizer that it was trained with beside the adapter"
        )
