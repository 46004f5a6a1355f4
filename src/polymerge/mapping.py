"""Find the tensors of two checkpoints that belong together: names on disk to canonical names.

A `Family` is a table of `Rule`s. Names are translated in one direction only, from the names of a checkpoint to
canonical ones, and what is found there is a read expression (`Read`, `Rows`, `Concat`) that says how to get the tensor.
Nothing here looks at a value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final, TypeAlias

from polymerge.errors import CheckpointError, RecipeError

__all__ = [
    "PARTS",
    "Concat",
    "Expr",
    "Family",
    "NameMap",
    "Read",
    "Rows",
    "Rule",
    "expr_from_json",
    "expr_to_json",
    "map_names",
    "names_read",
    "shape_of",
    "text_layer",
]

PARTS: Final = ("text", "vision", "projector", "audio")
"""The parts of a multimodal model; a canonical name starts with the one it belongs to."""

BUFFERS: Final = ("{rest}.inv_freq", "{rest}.position_ids")
"""Tensors that follow from the config and that old checkpoints store all the same: copied, never merged."""


# --- read expressions: how to get one canonical tensor from those on disk


@dataclass(frozen=True)
class Read:
    """One tensor on disk."""

    name: str


@dataclass(frozen=True)
class Rows:
    """The rows `start` to `stop` (exclusive) of another expression, such as q inside a fused qkv."""

    of: Expr
    start: int
    stop: int


@dataclass(frozen=True)
class Concat:
    """Several expressions stacked along dim 0, which is what a fused tensor is made of."""

    of: tuple[Expr, ...]


Expr: TypeAlias = Read | Rows | Concat
Shape: TypeAlias = tuple[int, ...]


def names_read(expr: Expr) -> tuple[str, ...]:
    """The names on disk that an expression reads, in reading order, each once."""
    match expr:
        case Read(name):
            return (name,)
        case Rows(of):
            return names_read(of)
        case Concat(of):
            return tuple(dict.fromkeys(name for block in of for name in names_read(block)))


def shape_of(expr: Expr, shapes: Mapping[str, Shape]) -> Shape:
    """The shape of what an expression reads, given the shapes on disk; raises CheckpointError where it cannot be."""
    match expr:
        case Read(name):
            if name not in shapes:
                raise CheckpointError(f"{name}: there is no such tensor in the checkpoint")
            return tuple(shapes[name])
        case Rows(of, start, stop):
            whole = shape_of(of, shapes)
            if not whole or not 0 <= start < stop <= whole[0]:
                raise CheckpointError(f"{', '.join(names_read(of))}: no rows {start} to {stop} in shape {list(whole)}")
            return (stop - start, *whole[1:])
        case Concat(of):
            blocks = [shape_of(block, shapes) for block in of]
            if not all(blocks) or len({block[1:] for block in blocks}) != 1:
                listed = ", ".join(str(list(block)) for block in blocks)
                raise CheckpointError(f"{', '.join(names_read(expr))}: shapes {listed} do not stack along dim 0")
            return (sum(block[0] for block in blocks), *blocks[0][1:])


def expr_to_json(expr: Expr) -> object:
    """An expression as JSON: a name, `{"rows": [start, stop], "of": ...}` or `{"concat": [...]}`."""
    match expr:
        case Read(name):
            return name
        case Rows(of, start, stop):
            return {"rows": [start, stop], "of": expr_to_json(of)}
        case Concat(of):
            return {"concat": [expr_to_json(block) for block in of]}


def expr_from_json(value: object) -> Expr:
    """The inverse of `expr_to_json`; raises RecipeError for anything that it does not write."""
    match value:
        case str(name):
            return Read(name)
        case {"rows": [int(start), int(stop)], "of": of, **rest} if not rest:
            return Rows(expr_from_json(of), start, stop)
        case {"concat": [_, *_] as blocks, **rest} if not rest:
            return Concat(tuple(expr_from_json(block) for block in blocks))
        case _:
            raise RecipeError(f"not a read expression: {value!r}. It is a name, {{rows, of}} or {{concat}}.")


# --- rules and families


@dataclass(frozen=True)
class Rule:
    """Whole names that match `pattern` have the name `canonical`; `{i}` is digits, `{rest}` any text but none."""

    pattern: str
    canonical: str

    def __post_init__(self) -> None:
        have, want = (re.findall(r"{(.*?)}", side) for side in (self.pattern, self.canonical))
        if len(set(have)) < len(have) or not set(want) <= set(have) <= {"i", "rest"}:
            raise ValueError(f"{self}: `{{i}}` and `{{rest}}` may stand once each, on the right only if on the left")

    def apply(self, name: str) -> str | None:
        """The canonical name of `name`, or None where the pattern does not match all of it."""
        found = _compiled(self.pattern).fullmatch(name)
        return self.canonical.format_map(found.groupdict()) if found else None


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression of a rule's pattern."""
    escaped = re.escape(pattern)
    return re.compile(escaped.replace(r"\{i\}", "(?P<i>[0-9]+)").replace(r"\{rest\}", "(?P<rest>.+)"))


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one family name their tensors, and by which configs they are recognised.

    `rules` are tried in order, the first that matches is applied once. `buffers` are patterns of tensors that are known
    and never merged. `source` names a published checkpoint of the family.
    """

    name: str
    rules: tuple[Rule, ...]
    model_types: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    title: str = ""
    source: str = ""
    buffers: tuple[str, ...] = BUFFERS

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that the rules lead to, in the order of `PARTS`; none for a family without structure."""
        reached = {rule.canonical.partition(".")[0] for rule in self.rules}
        return tuple(part for part in PARTS if part in reached)

    def part_of(self, canonical: str) -> str | None:
        """The part that a canonical name of this family belongs to."""
        part = canonical.partition(".")[0]
        return part if part in self.parts else None

    def is_buffer(self, name: str) -> bool:
        """Whether a tensor on disk is one that is recognised and never merged."""
        return any(_compiled(pattern).fullmatch(name) for pattern in self.buffers)

    def canonical(self, name: str) -> str | None:
        """The canonical name of a tensor on disk, or None for a buffer and for a name that no rule explains."""
        if self.is_buffer(name):
            return None
        applied = (rule.apply(name) for rule in self.rules)
        return next((canonical for canonical in applied if canonical is not None), None)


def text_layer(canonical: str) -> int | None:
    """The decoder layer that a canonical name belongs to, or None outside the text tower's layers."""
    found = _compiled("text.layers.{i}.{rest}").fullmatch(canonical)
    return int(found["i"]) if found else None


# --- a whole checkpoint


@dataclass(frozen=True)
class NameMap:
    """Where the canonical tensors of one checkpoint are read from, and what could not be placed.

    tensors   canonical name -> read expression
    buffers   names on disk that are recognised and never merged
    problems  names that no rule explains, and canonical names that two tensors claim
    """

    tensors: Mapping[str, Expr]
    buffers: tuple[str, ...]
    problems: tuple[CheckpointError, ...]


def map_names(family: Family, names: Iterable[str], checkpoint: str) -> NameMap:
    """Give every tensor name of a checkpoint its canonical name; `checkpoint` is what errors call it."""
    claimed: dict[str, str] = {}
    buffers: list[str] = []
    unknown: list[str] = []
    problems: list[CheckpointError] = []
    for name in names:
        canonical = family.canonical(name)
        if family.is_buffer(name):
            buffers.append(name)
        elif canonical is None:
            unknown.append(name)
        elif canonical in claimed:
            both = f"'{claimed[canonical]}' and '{name}' are both {canonical}"
            problems.append(CheckpointError(f"{checkpoint}: {both} in family '{family.name}'. Remove one of them."))
        else:
            claimed[canonical] = name
    problems += _unexplained(family, unknown, checkpoint)
    return NameMap({canonical: Read(name) for canonical, name in claimed.items()}, tuple(buffers), tuple(problems))


def _unexplained(family: Family, names: Iterable[str], checkpoint: str) -> list[CheckpointError]:
    """One error for all names that differ in their numbers only, so that 40 layers are not 40 errors."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"(?<=\.)[0-9]+(?=\.)", "{i}", name), []).append(name)
    return [
        CheckpointError(
            f"{checkpoint}: no rule of family '{family.name}' explains tensor '{first}'"
            + (f" ({len(more)} more like it)" if more else "")
            + f". Say which part it belongs to: add a Rule to polymerge/families/{family.name}.py."
        )
        for first, *more in alike.values()
    ]
