"""A base and its adapter as one model: every tensor that the adapter changes is read with the change in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from polymerge.checkpoint import Checkpoint, Entry
from polymerge.checkpoint.adapter import Adapter, Pair
from polymerge.checkpoint.joined import ADAPTER
from polymerge.dtypes import MERGEABLE
from polymerge.errors import CheckpointError, PolymergeError, RecipeError
from polymerge.families import family_of
from polymerge.families.generic import GENERIC
from polymerge.mapping import Family
from polymerge.reads import Adapted, Concat, Expr, Ranges, Read, Rows, replace_reads

__all__ = ["Parameters", "Ties", "changes", "parted"]


@dataclass(frozen=True)
class Ties:
    """A head and an embedding that a base's config ties, by the base's own names.

    virtual  which of them the base does not store, so that its name is only the one that the layout has for it: it is
             then the other one; empty where both are stored
    """

    embedding: str
    head: str
    virtual: str = ""

    @property
    def stored(self) -> str:
        """The one that is the virtual one as well."""
        return self.embedding if self.virtual == self.head else self.head


@dataclass(frozen=True)
class Parameters:
    """Where the parameters that an adapter names lie in its base: its own names, or names of another layout."""

    checkpoint: Checkpoint
    family: Family
    layout: Mapping[str, tuple[tuple[str, Ranges], ...]]
    ties: Ties | None = None

    @cached_property
    def joint(self) -> Mapping[str, str]:
        """Its own names by what they hold."""
        return self.family.by_joint(self.layout)

    def find(self, parameter: str, adapter: Adapter) -> str | None:
        """The name on disk of a parameter that the adapter calls `parameter`, or None."""
        if parameter in self.layout:
            return parameter
        for table in (self.family, family_of(adapter.model_config)):
            if (joint := table.joint(parameter)) in self.joint:
                return self.joint[joint]
            if self.ties and self.ties.virtual and joint and joint == self.family.joint(self.ties.virtual):
                return self.ties.virtual
        return None

    def read(self, name: str) -> Read:
        """A tensor of the base as it is, by its own name."""
        return Read(self.ties.stored if self.ties and name == self.ties.virtual else name)

    def entry(self, name: str) -> Entry:
        """What a tensor of the base is, by its own name."""
        return self.checkpoint.entries[self.read(name).name]


def changes(label: str, parameters: Parameters, adapter: Adapter, problems: list[PolymergeError]) -> dict[str, Expr]:
    """For each tensor of the base that the adapter changes, by its own name, what it is read as.

    What the adapter names and the base does not have, or has in another shape or in numbers that cannot be added to,
    is a problem. Where a base stores one tensor as head and embedding, and the adapter parts the two as it is loaded by
    PEFT, the one that has no tensor is found under the name that it would have.
    """
    found: dict[str, Expr] = {}
    missing: dict[str, None] = {}
    ties = parameters.ties
    kept_tied = ties is not None and bool(ties.virtual) and adapter.config.get("ensure_weight_tying") is True

    def own(parameter: str) -> str | None:
        name = parameters.find(parameter, adapter)
        if name is None:
            missing[parameter] = None
        elif kept_tied and ties and name == ties.virtual:
            return None  # the same numbers as those of the other one, which PEFT wrote twice
        elif parameters.entry(name).dtype not in MERGEABLE:
            dtype = parameters.entry(name).dtype
            problems.append(CheckpointError(f"'{label}': {name} is held as {dtype}: an adapter cannot be added to it"))
            return None
        return name

    def fits(name: str, shape: tuple[int, ...], what: str) -> bool:
        have = parameters.entry(name).shape
        if have != shape:
            problems.append(
                RecipeError(
                    f"'{label}': {what} of the adapter is for {list(shape)}, {name} of its base is {list(have)}. "
                    "Name the base that it was trained on"
                )
            )
        return have == shape

    for parameter, entry in adapter.extras.items():
        name = own(parameter)
        if name is not None and fits(name, entry.shape, parameter):
            found[name] = Read(ADAPTER + entry.name)
    trained: dict[str, tuple[tuple[int, ...], str]] = {}
    for parameter, (indices, entry) in adapter.tokens.items():
        name = own(parameter)
        if name is not None:
            rows = parameters.entry(name).shape[0]
            if fits(name, (max(rows, *(index + 1 for index in indices)), *entry.shape[1:]), parameter):
                found[name] = _with_rows(found.get(name, parameters.read(name)), rows, indices, ADAPTER + entry.name)
                trained[name] = indices, ADAPTER + entry.name
    if ties and ties.embedding in trained and ties.head not in trained:
        # PEFT has these rows in the head as well, before it adds anything else to it
        before = found.get(ties.head, parameters.read(ties.head))
        rows = parameters.entry(ties.head).shape[0]
        found[ties.head] = _with_rows(before, rows, *trained[ties.embedding])
    for pair in adapter.pairs.values():
        name = own(f"{pair.module}.weight")
        if name is not None and fits(name, pair.shape[::-1] if pair.transposed else pair.shape, pair.module):
            a, b = ADAPTER + pair.a.name, ADAPTER + pair.b.name
            found[name] = Adapted(found.get(name, parameters.read(name)), a, b, pair.scaling, pair.transposed)
        if pair.bias is not None:
            _add_bias(pair, own(f"{pair.module}.bias"), found)
    if ties and ties.virtual:
        _part(ties, found, kept_tied)
    tied = bool(parameters.checkpoint.config.get("tie_word_embeddings"))
    for head in [name for name in missing if tied and name.rpartition(".")[0].endswith("lm_head")]:
        del missing[head]
        problems.append(
            RecipeError(
                f"'{label}': the adapter has a {head} of its own, and its base ties the head to the embedding, so a "
                "checkpoint of it has no place for one. Keep the adapter apart, or untie the base first"
            )
        )
    if parameters.family is GENERIC and not any(name.endswith("lm_head.weight") for name in parameters.layout):
        alone = [
            *(name for name in adapter.extras if name.endswith(".embed_tokens.weight")),
            *(f"{pair.module}.weight" for pair in adapter.pairs.values() if pair.embedding),
        ]
        if alone and parameters.checkpoint.config.get("tie_word_embeddings") is not False:
            problems.append(
                RecipeError(
                    f"'{label}': the adapter changes {alone[0]} alone, which may be the head as well: its base stores "
                    "no lm_head.weight, and its family is not known, so nothing says what that one becomes. Fold it "
                    "with PEFT's merge_and_unload(), or say `family:` beside the model"
                )
            )
    if missing:
        few = ", ".join(list(missing)[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        way = (
            " (or a copy in which experts lie as they did there)"
            if any(".experts." in name for name in missing)
            else ""
        )
        problems.append(
            RecipeError(
                f"'{label}': the adapter ({adapter.folder}) has weights for {few}, which its base "
                f"({parameters.checkpoint.folder}, family {parameters.family.name}) does not have. Name the base that "
                f"it was trained on{way}"
            )
        )
    return found


def _part(ties: Ties, found: dict[str, Expr], kept_tied: bool) -> None:
    """Settle what becomes of the one of a tied pair that the base does not store; nothing where they stay one."""
    before = Read(ties.stored)
    one, other = found.get(ties.stored, before), found.get(ties.virtual, before)
    if kept_tied or one == other:
        found.pop(ties.virtual, None)
    else:
        found[ties.virtual] = other


def parted(ties: Ties | None, found: Mapping[str, Expr], adapter: Adapter) -> bool:
    """Whether an adapter makes two tensors of a head and an embedding that its base's config ties.

    found  what the adapter changes, as `changes` gives it
    """
    if ties is None or ties.virtual:
        return ties is not None and ties.virtual in found
    one = found.get(ties.embedding, Read(ties.embedding))
    other = replace_reads(
        found.get(ties.head, Read(ties.head)), lambda own: Read(ties.embedding if own == ties.head else own)
    )
    return one != other and adapter.config.get("ensure_weight_tying") is not True


def _add_bias(pair: Pair, name: str | None, found: dict[str, Expr]) -> None:
    if name is not None and pair.bias is not None:
        found[name] = Adapted(found.get(name, Read(name)), None, ADAPTER + pair.bias.name, pair.scaling)


def _with_rows(expr: Expr, total: int, indices: tuple[int, ...], rows: str) -> Expr:
    """An embedding in which the rows at `indices` are those of tensor `rows`, in that order."""
    blocks: list[Expr] = []
    end = 0
    for index, place in sorted((index, place) for place, index in enumerate(indices)):
        if end < index:
            blocks.append(Rows(expr, end, index))
        blocks.append(Rows(Read(rows), place, place + 1))
        end = index + 1
    if end < total:
        blocks.append(Rows(expr, end, total))
    return Concat(tuple(blocks))
