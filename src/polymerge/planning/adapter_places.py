"""Where the parameters that an adapter names lie in a base, whatever the model that it was trained on calls them.

That model need not be the base. An adapter of a language model goes onto every multimodal model of its decoder, one of
a bare body (`AutoModel`, names without `model.`) onto the model with its head. Names are read as canonical ones by one
family's table, all of an adapter by the same, and looked up among those of the base.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final, TypeAlias

from polymerge.checkpoints import Checkpoint, Entry
from polymerge.checkpoints.adapter import Adapter
from polymerge.checkpoints.files import read_config
from polymerge.families import FAMILIES, family_of
from polymerge.families.expressions import Expr, Ranges, Read, rows_of
from polymerge.families.generic import GENERIC
from polymerge.families.rules import Family, text_layer

__all__ = ["Block", "Parameters", "Place", "Reading", "Ties", "named_family", "reading_of", "readings_of"]

Block: TypeAlias = tuple[str, Ranges]
"""Rows of a tensor by its name on disk; no rows stand for all of them."""

Place: TypeAlias = tuple[Block, ...]
"""Where one parameter of an adapter lies in a base: in several blocks where it is fused here and split there."""

_BODY: Final = "model."
"""What transformers puts before the names of a body where a class with a head holds it."""


@dataclass(frozen=True)
class Reading:
    """One way to read an adapter's names: by a family's table, with `added` before them or without `removed`.

    guessed  by nothing but the names: then only what they say of the text tower counts
    """

    family: Family
    added: str = ""
    removed: str = ""
    guessed: bool = False

    def canonical(self, parameter: str) -> tuple[str, ...]:
        """The canonical names of a parameter, none where this reading does not explain it."""
        held = self.family.canonical(self.added + parameter.removeprefix(self.removed))
        return () if self.guessed and not all(name.startswith("text.") for name in held) else held

    def joint(self, parameter: str) -> str:
        """One name for all that a parameter holds: see `Family.joint`."""
        return "+".join(self.canonical(parameter)).replace(".{e}.", ".")


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
    """The tensors of a base, as the parameters of an adapter are looked up in them.

    layout  name on disk -> the canonical names that it holds, each with its rows; the virtual one of a tied pair too
    views   names on disk that hold all experts, which no adapter of one of them can be added to
    ties    the head and the embedding, where its config ties them
    """

    checkpoint: Checkpoint
    family: Family
    layout: Mapping[str, tuple[tuple[str, Ranges], ...]]
    views: Collection[str] = field(default=())
    ties: Ties | None = None

    @cached_property
    def joint(self) -> Mapping[str, str]:
        """Its own names by what they hold."""
        return self.family.by_joint(self.layout)

    @cached_property
    def blocks(self) -> Mapping[str, Block]:
        """Where each canonical tensor lies."""
        return {
            canonical: (own, ranges)
            for own, held in self.layout.items()
            if own not in self.views
            for canonical, ranges in held
        }

    @cached_property
    def depth(self) -> int:
        """How many layers its text tower has."""
        layers = (text_layer(canonical) for held in self.layout.values() for canonical, _ in held)
        return max((layer + 1 for layer in layers if layer is not None), default=0)

    def entry(self, name: str) -> Entry:
        """What a tensor of the base is, by its own name."""
        return self.checkpoint.entries[self.ties.stored if self.ties and name == self.ties.virtual else name]

    def read(self, block: Block) -> Expr:
        """How a block is read as it lies."""
        own, ranges = block
        expr = Read(self.entry(own).name)
        return rows_of(expr, ranges) if ranges else expr

    def reading(self, adapter: Adapter) -> Reading:
        """The reading that finds a place for the most of an adapter's parameters; the most trusted one of those."""
        names = adapter.parameters
        best, most = Reading(self.family), -1
        for reading in readings_of((self.family, *named_family(adapter))):
            count = sum(self.place(name, reading) is not None for name in names)
            if count > most:
                best, most = reading, count
            if count == len(names):
                break
        return best

    def place(self, parameter: str, reading: Reading) -> Place | None:
        """Where a parameter lies, or None; one that has no branch lies where a model with two has its text tokens'."""
        if parameter in self.layout:
            return ((parameter, ()),)
        if (joint := reading.joint(parameter)) in self.joint:
            return ((self.joint[joint], ()),)
        held = reading.canonical(parameter)
        found = [self.blocks.get(name) or self.blocks.get(f"{name}@text") for name in held]
        blocks = [block for block in found if block is not None]
        return tuple(blocks) if held and len(blocks) == len(held) else None


def named_family(adapter: Adapter) -> tuple[Family, ...]:
    """The family of the model that an adapter was trained on, where a config says it that lies here."""
    config = adapter.model_config
    base = adapter.config.get("base_model_name_or_path")
    file = Path(str(base)).expanduser() / "config.json" if base else None
    if not config and file is not None and file.is_file():
        config = read_config(file)
    return (family_of(config),) if config else ()


def readings_of(trusted: Sequence[Family]) -> Iterator[Reading]:
    """Every reading, the most trusted first: families that something says, then any by its names of a text tower."""
    said = {family.rules: family for family in trusted}.values()
    yield from (Reading(family) for family in said)
    yield from (Reading(family, added=_BODY) for family in said)
    yield from (Reading(family, removed=_BODY) for family in said)
    tables = {family.rules: family for family in reversed(list(FAMILIES.values())) if family is not GENERIC}
    by_parts = sorted(tables.values(), key=lambda family: len(family.parts))  # language models first
    for added in ("", _BODY):
        yield from (Reading(family, added=added, guessed=True) for family in by_parts)


def reading_of(names: Collection[str], trusted: Sequence[Family]) -> Reading:
    """The reading that explains the most names where no base is at hand; the most trusted one of those."""
    best, most = Reading(trusted[0]), -1
    for reading in readings_of(trusted):
        count = sum(bool(reading.canonical(name)) for name in names)
        if count > most:
            best, most = reading, count
        if count == len(names):
            break
    return best
