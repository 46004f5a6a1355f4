"""Map stored names to canonical tensors, as read expressions, with a family's table.

A read expression (see `polymerge.families.expressions`) tells how to read a tensor. Only names and shapes are used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from polymerge.checkpoints.bounds import EXPERTS
from polymerge.errors import CheckpointError
from polymerge.families.expressions import Expr, Ranges, Read, Shape, Stacked, names_read, rows_of, shape_of
from polymerge.families.rules import Family, Rule

__all__ = ["NameMap", "Split", "Stack", "apart", "map_names"]

_FEW = 3
"""Maximum number of names in an error."""


@dataclass(frozen=True)
class NameMap:
    """The locations of a checkpoint's canonical tensors, and the names that could not be mapped.

    tensors   canonical name -> read expression
    layout    name on disk -> the canonical names that it holds, each with its rows; no rows stand for all of them
    views     name on disk -> the view that those rows refer to, if it is not the tensor as stored
    buffers   names on disk that are recognised and never merged
    lost      names on disk of fused tensors whose rows cannot be determined
    unknown   names on disk that no rule explains
    problems  errors for these, for canonical names claimed by two tensors, and for fused tensors without a split
    """

    tensors: Mapping[str, Expr]
    layout: Mapping[str, tuple[tuple[str, Ranges], ...]]
    views: Mapping[str, Stacked]
    buffers: tuple[str, ...]
    lost: tuple[str, ...]
    unknown: tuple[str, ...]
    problems: tuple[CheckpointError, ...]


@dataclass(frozen=True)
class Stack:
    """How a three-dimensional tensor holds all experts: one matrix each, as in a linear layer or transposed.

    experts        their number, or None if the config does not tell
    rows, columns  of each matrix as in a linear layer; None if any size is possible
    """

    experts: int | None = None
    rows: int | None = None
    columns: int | None = None

    def ways(self, shape: Shape, parts: int) -> frozenset[bool]:
        """The orientations in which a tensor of that shape can hold them: as stored (False), transposed (True), or
        both.

        parts   number of matrices of equal height in each expert's
        """
        if len(shape) != 3 or 0 in shape or shape[0] > EXPERTS or self.experts not in (None, shape[0]):
            return frozenset()
        found = {False: shape[1:], True: shape[:0:-1]}
        return frozenset(
            transposed
            for transposed, (rows, columns) in found.items()
            if self.rows in (None, rows) and self.columns in (None, columns) and rows % parts == 0
        )

    def __str__(self) -> str:
        one = f"[{self.rows or '...'}, {self.columns or '...'}]"
        return f"{'experts' if self.experts is None else self.experts} x {one}, or each of them transposed"


Split: TypeAlias = tuple[Ranges, ...] | Stack
"""The rows of each canonical tensor in a fused one, or how one tensor holds all experts."""


def map_names(
    family: Family,
    names: Iterable[str],
    checkpoint: str,
    splits: Mapping[str, Split] | None = None,
    shapes: Mapping[str, Shape] | None = None,
) -> NameMap:
    """Map every tensor name of a checkpoint to canonical names; `checkpoint` is its name in errors.

    splits   for each kind of fused tensor that this checkpoint's config determines, the rows of its parts
    shapes   of the tensors, from which the layout of experts follows
    """
    read = {name: family.read(name) for name in names}
    buffers = tuple(name for name, found in read.items() if found is None and family.is_buffer(name))
    unknown = [name for name, found in read.items() if found is None and not family.is_buffer(name)]
    ruled = {
        name: (*found, _split(found[0], splits or {}, (shapes or {}).get(name, ())))
        for name, found in read.items()
        if found is not None
    }
    unsettled = {name: rule.split for name, (rule, _, split) in ruled.items() if rule.split and split is None}
    stacks = {name: (split, len(rule.names)) for name, (rule, _, split) in ruled.items() if isinstance(split, Stack)}
    views, problems = _views(stacks, shapes or {}, checkpoint)

    tensors: dict[str, Expr] = {}
    layout: dict[str, tuple[tuple[str, Ranges], ...]] = {}
    twice: dict[str, str] = {}
    for name, (_, held, split) in ruled.items():
        if name in views:
            layout[name] = _experts(held, views[name], (shapes or {})[name])
        elif name not in stacks and name not in unsettled:
            layout[name] = tuple(zip(held, split if isinstance(split, tuple) else ((),), strict=True))
        for canonical, ranges in layout.get(name, ()):
            if canonical in tensors:
                first = names_read(tensors[canonical])[0]
                twice[name] = f"'{first}' and '{name}' both mean {canonical} in family '{family.name}'"
            else:
                whole = views.get(name, Read(name))
                tensors[canonical] = rows_of(whole, ranges) if ranges else whole
    problems += [
        CheckpointError(f"{checkpoint}: {twice[first]}{more}. Keep one of them in the checkpoint.")
        for first, more in _alike(twice)
    ]
    problems += [
        CheckpointError(
            f"{checkpoint}: '{first}'{more} is fused by '{unsettled[first]}', and config.json does not say how many "
            "heads it holds, how wide an MLP, or how wide the model is. Complete config.json"
        )
        for first, more in _alike(unsettled, unsettled.get)
    ]
    if unknown:
        problems.append(_unexplained(family, unknown, read, checkpoint))
    lost = tuple(name for name in ruled if name not in layout)
    return NameMap(tensors, layout, views, buffers, lost, tuple(unknown), tuple(problems))


def _split(rule: Rule, splits: Mapping[str, Split], shape: Shape) -> Split | None:
    """How a rule splits a tensor of that shape; None if that is unknown.

    Beside what the config determines there are `equal` shares, `rows 64:16:16`, which are that high, `rows 64@8:16`, of
    which the first has heads of 8 rows and in each the even ones before the odd ones, and `experts 96:32`, which are
    matrices of that size.
    """
    words, count, height = rule.split.partition(" "), len(rule.names), shape[0] if shape else 0
    if words[0] == "rows":
        parts = [part.partition("@") for part in words[2].split(":")]
        rows, heads = [int(number) for number, _, _ in parts], [int(head or 0) for _, _, head in parts]
    elif words[0] == "experts":
        high, _, wide = words[2].partition(":")
        return Stack(rows=int(high), columns=int(wide))
    elif words[0] == "equal" and height % count == 0:
        rows, heads = [height // count] * count, [0] * count
    else:
        return splits.get(rule.split)
    edges = [sum(rows[:place]) for place in range(len(rows) + 1)]
    return tuple(_ranges(*edge, head) for edge, head in zip(pairwise(edges), heads, strict=True))


def _ranges(start: int, stop: int, head: int) -> Ranges:
    """The rows from `start` to `stop`; of each head of that height, if any, the even ones before the odd ones."""
    if not head:
        return ((start, stop),)
    return tuple(
        (row, row + 1)
        for first in range(start, stop, head)
        for parity in (first, first + 1)
        for row in range(parity, first + head, 2)
    )


def _unexplained(family: Family, unknown: list[str], names: Collection[str], checkpoint: str) -> CheckpointError:
    """One error for all names that no rule explains, with the `ignore` globs that would leave them out."""
    kinds = [f"'{first}'{more}" for first, more in _alike(unknown)]
    few = ", ".join(kinds[:_FEW]) + (", ..." if len(kinds) > _FEW else "")
    what = f"tensor {few}" if len(kinds) == 1 else f"{len(unknown)} of its {len(names)} tensors: {few}"
    globs = apart(unknown, set(names) - set(unknown))
    ignore = ", ".join(f'"{glob}"' for glob in globs)
    way = f"leave what is not of the model out with `ignore: [{ignore}]` in the recipe, or say"
    if len(globs) > _FEW:
        way = "say"
    return CheckpointError(
        f"{checkpoint}: no rule of family '{family.name}' explains {what}. If config.json names another model than the "
        f"file holds, mend it; else {way} `family:` beside the model. (Whoever adds names to the family: a Rule in "
        f"its table in polymerge/families/tables)"
    )


def apart(some: Iterable[str], others: Iterable[str]) -> list[str]:
    """The shortest globs that match all names in `some` and none of the `others`, such as `mtp.*`."""
    taken = {name[:place] for name in others for place, character in enumerate(f"{name}.") if character == "."}
    globs: dict[str, None] = {}
    for name in some:
        stops = [place for place, character in enumerate(name) if character == "."]
        stem = next((name[:stop] for stop in stops if name[:stop] not in taken), None)
        globs[name if stem is None else f"{stem}.*"] = None
    return list(globs)


def _views(
    stacks: Mapping[str, tuple[Stack, int]], shapes: Mapping[str, Shape], checkpoint: str
) -> tuple[dict[str, Stacked], list[CheckpointError]]:
    """The views of the tensors that hold all experts, with one orientation throughout a checkpoint.

    The orientation of square matrices follows from the others. If all are square, they are read as in transformers, as
    in a linear layer.
    """
    ways = {name: stack.ways(shapes.get(name, ()), parts) for name, (stack, parts) in stacks.items()}
    problems = [
        CheckpointError(
            f"{checkpoint}: '{first}'{more} is {list(shapes.get(first, ()))}, its config.json asks for "
            f"{stacks[first][0]}. Mend config.json or the file"
        )
        for first, more in _alike(name for name, found in ways.items() if not found)
    ]
    common = {False, True}.intersection(*(found for found in ways.values() if found))
    if not common:
        plain, flipped = (next(name for name, found in ways.items() if found == {way}) for way in (False, True))
        problems.append(
            CheckpointError(
                f"{checkpoint}: the experts of '{flipped}' {list(shapes[flipped])} lie transposed, those of '{plain}' "
                f"{list(shapes[plain])} do not. Write all of them alike"
            )
        )
    transposed = common == {True}
    return {name: Stacked(Read(name), transposed) for name, found in ways.items() if transposed in found}, problems


def _experts(held: tuple[str, ...], view: Stacked, shape: Shape) -> tuple[tuple[str, Ranges], ...]:
    """The rows of each expert's tensors in one that holds all experts; all of `held` of the first expert come first."""
    height = shape_of(view, {view.name: shape})[0] // (shape[0] * len(held))
    names = [name.replace("{e}", str(expert)) for expert in range(shape[0]) for name in held]
    return tuple((name, ((place * height, (place + 1) * height),)) for place, name in enumerate(names))


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<=\.)[0-9]+(?=\.)", "{i}", name)


def _alike(names: Iterable[str], kind: Callable[[str], object] = _without_numbers) -> list[tuple[str, str]]:
    """The first name of each kind, and the number of others, so that 40 layers are one error."""
    kinds: dict[object, list[str]] = {}
    for name in names:
        kinds.setdefault(kind(name), []).append(name)
    return [(first, f" ({len(more)} more like it)" if more else "") for first, *more in kinds.values()]
