"""An opened input of a plan: its headers, its family, and the location of each canonical tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple

from polymerge.checkpoints import Checkpoint, TensorInfo
from polymerge.checkpoints.beside import text_digests
from polymerge.checkpoints.folder import ADAPTER
from polymerge.checkpoints.names import is_lora
from polymerge.checkpoints.tensor_info import listed
from polymerge.dtypes import MERGEABLE
from polymerge.families import TextTower, family_of, quantization_method, text_tower
from polymerge.families.expressions import Expr, Ranges, Read, Scaled, Stacked, names_read, replace_reads, shape_of
from polymerge.families.fp8 import Fp8
from polymerge.families.names_on_disk import Published
from polymerge.families.registry import GENERIC
from polymerge.families.rules import Family, counterpart, text_layer
from polymerge.planning.plan import Input

__all__ = [
    "EMBEDDING",
    "HEAD",
    "VOCABULARY",
    "Form",
    "Model",
    "Ties",
    "digests_beside",
    "headers_digest",
    "own_name",
    "part_of",
    "settings_digest",
    "stored_in",
]

HEAD = "text.lm_head.weight"
EMBEDDING = "text.embed_tokens.weight"
VOCABULARY: Final = frozenset({EMBEDDING, HEAD, "text.lm_head.bias"})
"""Canonical tensors whose rows are the vocabulary."""


@dataclass(frozen=True)
class Ties:
    """A head and an embedding that a config ties, by a model's own names.

    virtual  the one that is not stored, by its name in the same layout; it shares the other's storage. Empty if
             both are stored
    """

    embedding: str
    head: str
    virtual: str = ""

    @property
    def stored(self) -> str:
        """The stored one, which also stands for the virtual one."""
        return self.embedding if self.virtual == self.head else self.head


class Form(NamedTuple):
    """What a tensor of an output is stored as."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Model:
    """An opened input.

    tensors  canonical name -> expression over its own names
    layout   own name -> the canonical names that it holds, each with its rows
    views    own name -> the view that those rows refer to, if it is not the tensor as stored
    buffers  own names that are never merged (rotary frequencies and the like)
    borrowed canonical names that are another tensor's storage: the head of a model that ties it to its embedding
    adapted  own names of the tensors that are not read as stored -> what they are read as: those that its adapter
             changes, if it has one, and those in fp8
    parted   whether its adapter unties the head and the embedding that its base's config ties
    ignored  own names that the recipe leaves out; no rule has to explain them
    wrappers prefixes stripped from the names as stored; own names do not have them
    other    the class that its config.json names, if it is not one of its family; otherwise empty
    ties     its head and embedding, if its config ties them or only one of them is stored
    by       the class of transformers that its family was derived from; empty for one of the tables
    why      why no family was derived for a generic one
    fp8      its weights in fp8 and their scales
    named    what its tensors are called as its family is published, by their names as stored
    renamed  name as stored -> own name, of those that are read under published names
    forms    own name -> the tensors that an output has in its place, which `layout` and `views` have, too
    moved    the canonical names in those
    """

    label: str
    path: Path
    checkpoint: Checkpoint
    family: Family
    tensors: Mapping[str, Expr]
    layout: Mapping[str, tuple[tuple[str, Ranges], ...]]
    views: Mapping[str, Stacked]
    buffers: frozenset[str]
    borrowed: frozenset[str]
    adapted: Mapping[str, Expr] = field(default_factory=dict)
    parted: bool = False
    ignored: frozenset[str] = frozenset()
    wrappers: tuple[str, ...] = ()
    other: str = ""
    ties: Ties | None = None
    by: str = ""
    why: str = ""
    fp8: Fp8 = field(default_factory=Fp8)
    named: Published = field(default_factory=Published)
    renamed: Mapping[str, str] = field(default_factory=dict)
    forms: Mapping[str, Mapping[str, Form]] = field(default_factory=dict)
    moved: frozenset[str] = frozenset()

    def with_scales(self) -> Model:
        """The same, with weights in fp8 read as numbers: the last thing to be done to its expressions."""
        if not self.fp8.scaled:
            return self

        def change(own: str) -> Expr:
            return self.fp8.scaled.get(own) or Read(own)

        adapted = dict.fromkeys((*self.adapted, *self.fp8.scaled))
        return replace(
            self,
            tensors={canonical: replace_reads(expr, change) for canonical, expr in self.tensors.items()},
            adapted={own: replace_reads(self.adapted.get(own, Read(own)), change) for own in adapted},
        )

    @property
    def entries(self) -> Mapping[str, TensorInfo]:
        """Its tensors by their own names, including those of its adapter."""
        return self.checkpoint.entries

    @cached_property
    def stored(self) -> Mapping[str, TensorInfo]:
        """Its tensors by their own names, without those of its adapter, those that are ignored, and scales."""
        left = self.ignored | self.fp8.beside
        return {name: entry for name, entry in stored_in(self.checkpoint).items() if name not in left}

    @cached_property
    def written(self) -> Mapping[str, Form]:
        """What an output in its layout stores, by the names there: its own tensors, or the forms in their place."""
        return {
            name: form
            for own, entry in self.stored.items()
            for name, form in self.forms.get(own, {own: Form(entry.dtype, entry.shape)}).items()
        }

    def has_numbers(self, own: str) -> bool:
        """Whether a tensor holds numbers that can be computed with."""
        return own in self.fp8.scaled or self.entries[own].dtype in MERGEABLE

    def view(self, own: str) -> Stacked | Scaled | None:
        """The view of a tensor that the rows in `layout` refer to; None if it is the tensor as stored."""
        scaled, stacked = self.fp8.scaled.get(own), self.views.get(own)
        return (stacked and scaled and replace(stacked, of=scaled)) or stacked or scaled

    @cached_property
    def tower(self) -> TextTower:
        """Its text tower as its config describes it."""
        return text_tower(self.checkpoint.config, self.family)

    @property
    def misnamed(self) -> bool:
        """Whether its config.json names a class that cannot load its tensors."""
        named = family_of(self.checkpoint.config)
        return bool(
            self.other and named != GENERIC and not (named.explains(self.stored) and named.has_mark(self.stored))
        )

    @property
    def generic(self) -> bool:
        """Whether its family is unknown, so that tensors are joined by identical names."""
        return self.family.name == GENERIC.name

    @property
    def why_generic(self) -> str:
        """Why transformers' class does not tell its family, as the end of a sentence; empty if it does."""
        return f" ('{self.label}': {self.why})" if self.why else ""

    @property
    def parts(self) -> frozenset[str]:
        """The parts that it has tensors of; empty for a generic model."""
        return frozenset() if self.generic else frozenset(map(part_of, self.tensors))

    @property
    def multimodal(self) -> bool:
        """Whether it has parts other than a text tower, as far as its family tells."""
        return bool(self.parts - {"text"})

    @property
    def depth(self) -> int:
        """The number of layers of its text tower, counted in its tensors."""
        return max((layer + 1 for name in self.tensors if (layer := text_layer(name)) is not None), default=0)

    @property
    def layers(self) -> int:
        """The number of layers that a schedule is over: what its config says, or else counted in its tensors."""
        return self.tower.layers or self.depth

    @property
    def config_ties(self) -> bool:
        """Whether its config ties the head to the embedding, regardless of what is stored."""
        return self.tower.ties_head is True

    @property
    def ties_head(self) -> bool:
        """Whether head and embedding are one tensor: only one is stored, or both share storage in a torch file.

        A head that is stored beside the embedding is independent, whatever the config says: transformers 5 ties the
        two only if all their values are equal.
        """
        if self.borrowed & {HEAD, EMBEDDING}:
            return True
        if self.parted or not self.config_ties or not {HEAD, EMBEDDING} <= self.tensors.keys():
            return False
        own = {canonical: name for name, held in self.layout.items() for canonical, _ in held}
        head, embedding = (self.checkpoint.aliases.get(own[name], own[name]) for name in (HEAD, EMBEDDING))
        return head == embedding

    @property
    def parted_name(self) -> str:
        """The name of the head or embedding that its adapter unties; empty if there is none."""
        return next((name for name in self.layout if name not in self.written), "")

    def find(self, canonical: str) -> str | None:
        """Its canonical name for the template's `canonical`: the same name, or the branch that substitutes for it."""
        return counterpart(canonical, self.tensors)

    def held(self, own: str) -> tuple[str, ...]:
        """The canonical names in a tensor, by its own name; for a tensor of its adapter, those that it changes."""
        changed = (
            [own] if own in self.layout else [name for name, expr in self.adapted.items() if own in names_read(expr)]
        )
        return tuple(dict.fromkeys(canonical for name in changed for canonical, _ in self.layout.get(name, ())))

    @cached_property
    def joint(self) -> Mapping[str, str]:
        """Canonical content -> own name: see `Family.joint`."""
        return self.family.by_joint(self.layout)

    def expr_of(self, joint: str) -> Expr | None:
        """The expression that reads the tensor with this canonical name, or several joined: see `Family.joint`."""
        if (found := self.find(joint)) is not None:
            return self.tensors[found]
        own = self.joint.get(joint)
        return None if own is None else self.adapted.get(own, Read(own))

    def shape(self, canonical: str) -> tuple[int, ...]:
        """The shape of a canonical tensor."""
        return shape_of(self.tensors[canonical], self.shapes)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each tensor by its own name."""
        return {name: entry.shape for name, entry in self.entries.items()}

    @cached_property
    def unread(self) -> frozenset[str]:
        """The canonical names of ignored tensors, as far as rules explain them."""
        return frozenset(canonical for name in self.ignored for canonical in self.family.canonical(name))

    def remarks(self) -> Iterator[str]:
        """Sentences on tensors that were read differently from what config or names say."""
        if self.wrappers:
            around = list(dict.fromkeys(f"'{wrapper.strip('.')}.'" for wrapper in self.wrappers))
            are = "are" if around[1:] else "is"
            yield (
                f"'{self.label}': {' and '.join(around)} of its tensor names {are} added by a trainer; they are read "
                "and written without"
            )
        if self.by:
            yield (
                f"'{self.label}': no table covers model_type '{self.family.name}', so transformers was imported for it "
                f"once, and it is read as {self.by} loads it"
            )
        if self.family.inside:
            yield f"'{self.label}' has only the names of the body: '{self.family.inside}' is read before each"
        if self.other:
            yield (
                f"'{self.label}': its config.json names {self.other}, its tensors are those of family "
                f"{self.family.name}, and are read as such"
            )
        if self.fp8.scaled:
            yield self._remark_on_fp8()
        elif (method := quantization_method(self.checkpoint.config)) is not None:
            yield (
                f"'{self.label}': its config.json says that it is quantized ({method}), and its weights are plain: "
                "that setting is outdated and is ignored"
            )
        for reason in dict.fromkeys(self.fp8.dropped.values()):
            names = [name for name, why in self.fp8.dropped.items() if why == reason]
            yield f"'{self.label}': {listed(names)} {'are' if names[1:] else 'is'} left out: {reason}"
        if any(map(is_lora, self.stored)):
            yield f"'{self.label}' has LoRA factors among its tensors, which are merged as ordinary tensors"

    def _remark_on_fp8(self) -> str:
        dtypes = " and ".join(sorted({self.entries[name].dtype for name in self.fp8.scaled}))
        count = len(self.fp8.scaled)
        return (
            f"'{self.label}': {count} of its tensors {'are' if count > 1 else 'is'} quantized ({dtypes}, a scale for "
            f"each {self.fp8.kind}), and read as numbers, each times its scale in float32; what was cut off at the "
            "largest number of fp8 stays so"
        )

    def summary(self) -> Input:
        """The plan's record of this input."""
        return Input(
            label=self.label,
            source=self.checkpoint.source,
            path=str(self.path),
            adapter=str(self.checkpoint.adapter.folder) if self.checkpoint.adapter else "",
            family=self.family.name,
            tensors=len(self.entries),
            size=sum(entry.nbytes for entry in self.entries.values()),
            headers=headers_digest(self.checkpoint),
            settings=settings_digest(self.checkpoint),
            beside=digests_beside(self.checkpoint),
            files=dict(self.checkpoint.adapter.became) if self.checkpoint.adapter else {},
            wrappers=self.wrappers,
            renamed=dict(self.renamed),
            layers=self.layers,
            opened=self.checkpoint,
        )


def stored_in(checkpoint: Checkpoint) -> Mapping[str, TensorInfo]:
    """A checkpoint's tensors without those of the adapter beside it."""
    if checkpoint.adapter is None:
        return checkpoint.entries
    return {name: entry for name, entry in checkpoint.entries.items() if not name.startswith(ADAPTER)}


def headers_digest(checkpoint: Checkpoint) -> str:
    """sha256 over the names, dtypes, shapes and order of a checkpoint's tensors."""
    digest = hashlib.sha256()
    for entry in checkpoint.entries.values():
        digest.update(f"{entry.name}\0{entry.dtype}\0{entry.shape}\n".encode())
    return digest.hexdigest()


def settings_digest(checkpoint: Checkpoint) -> str:
    """sha256 over the configs of a checkpoint and of its adapter, however they are written."""
    adapter = checkpoint.adapter
    said = [checkpoint.config, *([adapter.config, adapter.model_config] if adapter else [])]
    text = json.dumps([dict(config) for config in said], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def digests_beside(checkpoint: Checkpoint) -> dict[str, str]:
    """The sha256 of the files of text beside the weights of a checkpoint and of its adapter: see `Input.beside`."""
    found = text_digests(checkpoint.folder)
    if checkpoint.adapter is not None and checkpoint.adapter.folder != checkpoint.folder:
        found |= {f"+{name}": digest for name, digest in text_digests(checkpoint.adapter.folder).items()}
    return found


def part_of(canonical: str) -> str:
    """The part of a canonical name."""
    return canonical.partition(".")[0]


def own_name(expr: Expr) -> str:
    """The first tensor that an expression reads, by its own name."""
    return names_read(expr)[0]
