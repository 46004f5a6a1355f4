"""Canonical names, by which tensors of different checkpoints are joined, and the tables that map stored names to them.

A `Family` is a table of `Rule`s. Names are translated in one direction only, from the names of a checkpoint to
canonical ones; `resolve` finds the tensors by them. Nothing here looks at a value.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Final

__all__ = [
    "PARTS",
    "Family",
    "Rule",
    "counterpart",
    "text_layer",
    "without_branch",
]

PARTS: Final = ("text", "vision", "projector", "audio")
"""The parts of a multimodal model; a canonical name begins with its part."""

BUFFERS: Final = ("{rest}.inv_freq", "{rest}.position_ids")
"""Tensors that follow from the config but are stored in old checkpoints: copied, never merged."""


@dataclass(frozen=True)
class Rule:
    """Maps names that match `pattern` entirely to canonical names; `{i}`, `{e}` are digits, `{rest}` is any text.

    `{i}` is the layer and `{e}` the expert; `{rest}` is not empty. A rule for `only` some layers numbers them among
    themselves; a rule `without` some layers is for all others, numbered as if those were not there.

    A fused tensor holds several canonical ones in its rows: `canonical` is then all of their names, and `split` names
    the way its rows are split (see `resolve.Split`), or the order in which the rows of one lie. For a tensor of all
    experts, `{e}` is on the right alone. A name may end in a branch, `@text` or `@image`, where a model has one tensor
    for text tokens and another for image tokens.
    """

    pattern: str
    canonical: str | tuple[str, ...]
    split: str = ""
    only: tuple[int, ...] = ()
    without: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        have = re.findall(r"{(.*?)}", self.pattern)
        want = {field for name in self.names for field in re.findall(r"{(.*?)}", name)}
        experts = {"e"} & (want - set(have))
        if len(set(have)) < len(have) or not want - experts <= set(have) <= {"i", "e", "rest"}:
            raise ValueError(
                f"{self}: `{{i}}`, `{{e}}`, `{{rest}}` may stand once each, on the right only if on the left"
            )
        if bool(self.split) != (len(self.names) > 1 or bool(experts)) and not self.order:
            raise ValueError(
                f"{self}: several canonical names, or all experts, need a split; one name has none but an order of rows"
            )

    @property
    def order(self) -> str:
        """In what order the rows of its tensors lie, where that is not the order in memory; else empty."""
        return f" as {self.split}" if "@" in self.split else ""

    @property
    def names(self) -> tuple[str, ...]:
        """The canonical names that a tensor holds."""
        return (self.canonical,) if isinstance(self.canonical, str) else self.canonical

    def apply(self, name: str) -> tuple[str, ...] | None:
        """The canonical names for `name`, or None if the rule does not match.

        `{e}` stays in the names if `name` holds all experts.
        """
        found = _compiled(self.pattern).fullmatch(name)
        if found is None:
            return None
        fields = {"e": "{e}", **found.groupdict()}
        if self.only or self.without:
            layer = int(fields["i"])
            if layer in self.without or (self.only and layer not in self.only):
                return None
            before = sum(one < layer for one in self.only or self.without)
            fields["i"] = str(before if self.only else layer - before)
        return tuple(canonical.format_map(fields) for canonical in self.names)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression of a rule's pattern."""
    escaped = re.escape(pattern)
    for name, text in (("i", "[0-9]+"), ("e", "[0-9]+"), ("rest", ".+")):
        escaped = escaped.replace(rf"\{{{name}\}}", f"(?P<{name}>{text})")
    return re.compile(escaped)


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one family name their tensors, and the configs that identify it.

    `rules` are tried in order, the first that matches is applied once. `decoders` are the lineages that the text towers
    of its checkpoints come from, the usual one first; two models can be joined where they share one. `buffers` are
    patterns of tensors that are known and never merged. `source` names a published checkpoint of the family.

    unloaded     patterns of stored tensors that its class does not load: they are never merged either
    lineages     by model type or architecture, the lineage if it is not the usual one; "" if
                 only the weights tell which
    defaults     the class's sizes, for configs that omit them
    interleaved  the key in the text config that lists the layers between those of the plain decoder
    ties         whether its class ties the head to the embedding by default
    inside       prefix to add to every name, if a checkpoint has the names of the body alone
    mark         pattern of a canonical name that its vision or audio tower has, and that of a relative lacks, with
                 the same rules
    published    rules from names that transformers 5 has in memory to those that the family is published with
    boxed        what the published names of a CLIP or SigLIP tower begin with; in memory the last level is gone
    flipped      whether published files have each expert transposed against what transformers 5 has in memory
    """

    name: str
    rules: tuple[Rule, ...]
    model_types: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    decoders: tuple[str, ...] = ()
    title: str = ""
    source: str = ""
    buffers: tuple[str, ...] = BUFFERS
    unloaded: tuple[str, ...] = ()
    lineages: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, int | tuple[int, ...]] = field(default_factory=dict)
    interleaved: str = ""
    ties: bool = False
    inside: str = ""
    mark: str = ""
    published: tuple[Rule, ...] = ()
    boxed: str = ""
    flipped: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that the rules map to, in the order of `PARTS`; empty for a family without structure."""
        reached = {name.partition(".")[0] for rule in self.rules for name in rule.names}
        return tuple(part for part in PARTS if part in reached)

    def part_of(self, canonical: str) -> str | None:
        """The part that a canonical name of this family belongs to."""
        part = canonical.partition(".")[0]
        return part if part in self.parts else None

    def is_buffer(self, name: str) -> bool:
        """Return whether a stored tensor is known and never merged: a buffer, or one that its class does not load."""
        return self.why_unmerged(name) != ""

    def why_unmerged(self, name: str) -> str:
        """Why a stored tensor is never merged; empty if it is not one of those."""
        if any(_compiled(pattern).fullmatch(name) for pattern in self.buffers):
            return "a buffer that is computed from the config, never merged"
        unloaded = any(_compiled(pattern).fullmatch(name) for pattern in self.unloaded)
        return "transformers does not load it, so it is never merged" if unloaded else ""

    def canonical(self, name: str) -> tuple[str, ...]:
        """The canonical names in a stored tensor; empty for buffers and names that no rule explains."""
        found = self.read(name)
        return found[1] if found else ()

    def joint(self, name: str) -> str:
        """One canonical name for the entire content of a stored tensor; empty if no rule explains it."""
        found = self.read(name)
        return "+".join(found[1]).replace(".{e}.", ".") + found[0].order if found else ""

    def order(self, name: str) -> str:
        """In what order the rows of a stored tensor lie: see `Rule.order`."""
        rule = self.rule(name)
        return rule.order if rule else ""

    def by_joint(self, names: Iterable[str]) -> dict[str, str]:
        """The stored names by their content: see `joint`."""
        return {self.joint(name): name for name in names}

    def rule(self, name: str) -> Rule | None:
        """The first rule that matches a stored name; None for a buffer."""
        found = self.read(name)
        return found[0] if found else None

    def explains(self, names: Iterable[str]) -> bool:
        """Return whether every stored name is a buffer or has a rule."""
        return all(self.read(name) or self.is_buffer(name) for name in names)

    def has_mark(self, names: Iterable[str]) -> bool:
        """Return whether its mark is among the stored names, or is not needed: it has none, or only the text tower
        is stored.
        """
        held = {canonical for name in names for canonical in self.canonical(name)} if self.mark else set()
        marked = any(_compiled(self.mark).fullmatch(canonical) for canonical in held)
        return marked or not any(canonical.startswith(("vision.", "audio.")) for canonical in held)

    def read(self, name: str) -> tuple[Rule, tuple[str, ...]] | None:
        """The rule of a stored name, and the canonical names that it gives."""
        if self.is_buffer(name):
            return None
        for full in dict.fromkeys((self.inside + name, name)):
            for rule in self.rules:
                if (held := rule.apply(full)) is not None:
                    return rule, held
        return None


def without_branch(canonical: str) -> str:
    """A canonical name without its branch."""
    return canonical.partition("@")[0]


def counterpart(canonical: str, names: Container[str]) -> str | None:
    """The name among a checkpoint's canonical `names` that corresponds to `canonical`: itself or a substitute.

    For a branch that the checkpoint does not have it is the tensor without branches; without a branch, if the
    checkpoint has two, it is that of the text tokens.
    """
    plain = without_branch(canonical)
    asked = (canonical, plain) if plain != canonical else (canonical, f"{canonical}@text")
    return next((name for name in asked if name in names), None)


def text_layer(canonical: str) -> int | None:
    """The decoder layer of a canonical name, or None outside the text tower's layers."""
    found = _compiled("text.layers.{i}.{rest}").fullmatch(canonical)
    return int(found["i"]) if found else None
