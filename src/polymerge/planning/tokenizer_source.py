"""The output's vocabulary where the recipe chooses it: `tokenizer_source`, as in mergekit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from polymerge.checkpoints.files import read_config
from polymerge.checkpoints.prefetch import fetched
from polymerge.checkpoints.tensor_info import listed
from polymerge.checkpoints.tokenizer import AddedToken, read_added
from polymerge.errors import PolymergeError, RecipeError, refuse
from polymerge.paths import given_path
from polymerge.planning.companions import tokenizer_folder
from polymerge.planning.inputs import Models
from polymerge.planning.model import EMBEDDING, VOCABULARY, Model
from polymerge.planning.plan import Vocabulary
from polymerge.planning.tokens import Tokens, first_rows
from polymerge.recipe.recipe import Recipe

__all__ = ["OutputVocabulary", "output_vocabulary"]

_OF_TEXT: Final = (
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id",
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id",
)  # fmt: skip
"""Keys of configs for the numbers of tokens that every language model has, and that a tokenizer brings along."""

_CONFIGS: Final = ("config.json", "generation_config.json")

_Ids = Mapping[str, object]


@dataclass(frozen=True)
class OutputVocabulary:
    """The tokens of an output, if `tokenizer_source` says which.

    source   as in the recipe
    keeper   the model whose tokenizer the output has, and whose rows stay where a row stands for no token
    tokens   the token of each row
    added    tokens that the keeper's tokenizer lacks, each with the model that has it
    agrees   whether all models have one vocabulary, so that rows merge by number and nothing is to be filled in
    changes  whether the template has another vocabulary
    ids      by file, the numbers of tokens that its config has to name instead of the template's
    """

    source: str
    keeper: Model
    tokens: Mapping[int, str] = field(default_factory=dict)
    added: tuple[tuple[AddedToken, Model], ...] = ()
    agrees: bool = False
    changes: bool = False
    ids: Mapping[str, _Ids] = field(default_factory=dict)

    def places(self, total: int) -> dict[str, int]:
        """The first of `total` rows for each token."""
        return first_rows(self.tokens, total)

    def rows(self, canonical: str, total: int) -> int:
        """The rows of a tensor: the keeper's, and more if tokens are added beyond them; `total` if it has none."""
        found = self.keeper.find(canonical)
        if found is not None:
            total = self.keeper.shape(found)[0]
        return max(total, *(token.id + 1 for token, _ in self.added)) if self.added else total

    def brings(self, template: Model) -> bool:
        """Return whether the output has the files of the keeper's tokenizer instead of the template's.

        Where all vocabularies agree, a language model's do not replace those of a multimodal template.
        """
        return self.keeper is not template and not (self.agrees and template.multimodal and not self.keeper.multimodal)

    def warnings(self) -> Iterator[str]:
        """A sentence on added tokens that the other tokenizer makes by its own rules, which the output's lacks."""
        words = [token.content for token, _ in self.added if token.normalized and not token.special]
        if words:
            are = "are tokens" if words[1:] else "is a token"
            yield (
                f"tokenizer_source: union: {len(words)} of the {len(self.added)} added {are} of another tokenizer's "
                f"own vocabulary ({listed(words)}). As in mergekit they are found in a text as they stand, before it "
                "is split: no merge makes them"
            )

    def recorded(self, filled: Mapping[str, Mapping[str, int]]) -> Vocabulary:
        """The plan's record; `filled` has the rows that each model is lent, by whose they are."""
        lenders: dict[str, int] = {}
        for _, model in self.added:
            lenders[model.label] = lenders.get(model.label, 0) + 1
        return Vocabulary(
            self.source,
            self.keeper.label,
            self.agrees,
            self.rows(EMBEDDING, 0),
            tuple(token for token, _ in self.added),
            lenders,
            filled,
            self.ids,
        )


def output_vocabulary(
    recipe: Recipe, models: Models, readers: Sequence[Model], tokens: Tokens
) -> OutputVocabulary | None:
    """The vocabulary that a recipe chooses for its output; None if it chooses none, or that is refused."""
    source = recipe.tokenizer_source
    if source is None:
        return None
    inputs = tuple(dict.fromkeys((models.template, *readers)))
    keeper = _keeper(source, recipe, models, inputs)
    if keeper is None:
        return None
    if _agree(inputs, tokens):
        return OutputVocabulary(source, keeper, agrees=True)
    if models.template.generic:
        refuse(
            RecipeError(
                "tokenizer_source: the template's family is unknown, so it is unknown which of its tensors are "
                "embeddings, and the models' vocabularies differ. Leave out tokenizer_source"
            )
        )
        return None
    if not all(tokens.of(model) for model in inputs):
        return None  # which is refused
    kinds = {model: tokens.kind(model) for model in inputs}
    other = next((model for model in inputs if kinds[model] != kinds[keeper]), None)
    if other is not None:
        refuse(
            RecipeError(
                f"tokenizer_source: {source}: the tokenizers of '{keeper.label}' and '{other.label}' are of different "
                f"kinds: one {_marks(kinds[keeper])}, the other {_marks(kinds[other])}, so one text is not the same "
                "token in both. Leave out tokenizer_source, and name embeddings and head in exclude"
            )
        )
        return None
    chosen = OutputVocabulary(source, keeper, tokens.of(keeper))
    if source == "union":
        try:
            added = tuple(_added(keeper, inputs, tokens))
        except PolymergeError as error:
            refuse(error)
            return None
        by_row = {token.id: token.content for token, _ in added}
        chosen = replace(chosen, tokens={**chosen.tokens, **by_row}, added=added)
        _refuse_two_heights(keeper, chosen)
    changes = any(token.id not in tokens.of(keeper) for token, _ in chosen.added) or (
        keeper is not models.template and not _agree((models.template, keeper), tokens)
    )
    return replace(chosen, changes=changes, ids=_ids(models.template, chosen, tokens) if changes else {})


def _keeper(source: str, recipe: Recipe, models: Models, inputs: Sequence[Model]) -> Model | None:
    """The model whose tokenizer the output has; for a union that of the template, to which others add."""
    if source == "union":
        return models.template
    if source == "base":
        found = models.base if recipe.base_model is not None else models.merged[0]
    else:
        given = given_path(source)
        found = next(
            (
                model
                for model in inputs
                if model.checkpoint.source == source or (given.exists() and given.resolve() == model.path.resolve())
            ),
            None,
        )
    if found in inputs:
        return found
    if source == "base":
        why = f"{recipe.merge_method} does not read base_model. List it among models, or name one of them"
    else:
        why = f"'{source}' is none of the models that are read: say base, union, or one of " + ", ".join(
            f"'{model.checkpoint.source}'" for model in inputs
        )
    refuse(RecipeError(f"tokenizer_source: {why}"))
    return None


def _agree(inputs: Sequence[Model], tokens: Tokens) -> bool:
    """Return whether models have the same tokens in the same rows, and as many rows.

    Tokenizers that cannot be read are refused.
    """
    first, *others = inputs
    if not others:
        return True
    heights = [{name: model.shape(found)[0] for name in VOCABULARY if (found := model.find(name))} for model in inputs]
    if any(one[name] != other[name] for one in heights for other in heights for name in one.keys() & other.keys()):
        return False
    return all(tokens.same_file(first, other) or tokens.of(first) == tokens.of(other) for other in others)


def _marks(kind: str) -> str:
    return f"marks words by '{kind}'" if kind else "does not mark words"


def _added(keeper: Model, inputs: Sequence[Model], tokens: Tokens) -> Iterator[tuple[AddedToken, Model]]:
    """The tokens of all models that the keeper's tokenizer lacks, numbered from its end on.

    As in mergekit first those of the others' own vocabularies, model by model, which are found literally from then on,
    then those that were added to theirs, as these are set. One that is in the keeper's vocabulary, and added in
    another's, keeps its number and is set as there. Tokens for which a model has no row are not among them.
    """
    held = {token: number for number, token in tokens.of(keeper).items()}
    known = {token.content for token in read_added(tokenizer_folder(keeper.checkpoint))}
    number = max(held.values(), default=-1) + 1
    special = {
        model: [one for one in read_added(tokenizer_folder(model.checkpoint)) if one.id < _height(model)]
        for model in inputs
    }
    beside = {one.content for found in special.values() for one in found}
    for model in inputs:
        for token, _ in sorted(tokens.places(model, _height(model)).items(), key=lambda one: one[1]):
            if token not in beside and token not in held:
                held[token] = number
                yield AddedToken(number, token, normalized=True), model
                number += 1
    for model in inputs:
        for one in special[model]:
            if one.content in known:
                continue
            known.add(one.content)
            if one.content not in held:
                held[one.content] = number
                number += 1
            yield replace(one, id=held[one.content]), model


def _height(model: Model) -> int:
    found = model.find(EMBEDDING)
    return model.shape(found)[0] if found is not None else 0


def _refuse_two_heights(keeper: Model, chosen: OutputVocabulary) -> None:
    """Refuse to add rows to a model whose tensors for tokens have different numbers of rows, or that has others."""
    own = {name: keeper.shape(found)[0] for name in sorted(VOCABULARY) if (found := keeper.find(name)) is not None}
    height = _height(keeper)
    grows = chosen.rows(EMBEDDING, 0) > height
    heads = {name: rows for name, rows in own.items() if rows != height}
    embeddings = [name for name in keeper.tensors if name.startswith("text.") and "embed" in name]
    beside = [name for name in embeddings if name not in VOCABULARY and keeper.shape(name)[:1] == (height,)]
    if grows and (heads or beside):
        name = next(iter(heads), beside[0] if beside else "")
        refuse(
            RecipeError(
                f"tokenizer_source: union: tokens are added beyond the {height} rows of '{keeper.label}', and its "
                f"{name} has {heads.get(name, height)} rows, which nobody can lend any. Name one of the models instead"
            )
        )


def _ids(template: Model, chosen: OutputVocabulary, tokens: Tokens) -> dict[str, _Ids]:
    """By file of the output, the keys for numbers of tokens that change, with their values.

    The numbers that every language model has are the keeper's where they would stand for another token. All others,
    such as that of an image's place, have to stay: processors and code know them as well.
    """
    before, after, found = tokens.of(template), chosen.tokens, dict[str, _Ids]()
    for file in _CONFIGS:
        own, theirs = (_config(model, file) for model in (template, chosen.keeper))
        changed: dict[str, object] = {}
        for key, value in _numbers(own):
            numbers = [one for one in (value if isinstance(value, list) else [value]) if one in before]
            if all(before[one] == after.get(one) for one in numbers):
                continue
            if key in _OF_TEXT:
                changed[key] = next((said for name, said in _numbers(theirs) if name == key), None)
                continue
            moved = next(one for one in numbers if before[one] != after.get(one))
            refuse(
                RecipeError(
                    f"tokenizer_source: {chosen.source}: {file} of '{template.label}' has {key}: {moved}, its token "
                    f"'{before[moved]}', which is {after.get(moved, 'none')!r} in the tokenizer of "
                    f"'{chosen.keeper.label}': the model would not see what is not text. Say union, which keeps the "
                    f"template's tokens and adds the others', or name '{template.checkpoint.source}'"
                )
            )
        if changed:
            found[file] = changed
    return found


def _config(model: Model, file: str) -> Mapping[str, Any]:
    if file == _CONFIGS[0]:
        return model.checkpoint.config
    path = model.checkpoint.folder / file
    if path.is_symlink():  # one that the hub has
        fetched(path)
    return read_config(path)


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys of a config, at every level, whose values are numbers of tokens."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif key.endswith(("token_id", "token_index", "token_ids")):
            several = value if isinstance(value, list) else [value]
            if several and all(type(one) is int for one in several):
                yield key, value
