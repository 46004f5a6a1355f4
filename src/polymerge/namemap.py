"""Find where the canonical tensors of a checkpoint lie: names on disk to read expressions, by a family's table.

What is found is a read expression (see `polymerge.reads`) that says how to get the tensor. Names and shapes are looked
at here, and no value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from polymerge.errors import CheckpointError
from polymerge.mapping import Family
from polymerge.reads import Expr, Ranges, Read, Shape, Stacked, names_read, rows_of, shape_of

__all__ = ["NameMap", "Split", "Stack", "map_names"]


@dataclass(frozen=True)
class NameMap:
    """Where the canonical tensors of one checkpoint are read from, and what could not be placed.

    tensors   canonical name -> read expression
    layout    name on disk -> the canonical names that it holds, each with its rows; no rows stand for all of them
    views     name on disk -> what those are the rows of, where it is not the tensor as it lies
    buffers   names on disk that are recognised and never merged
    problems  names that no rule explains, and canonical names that two tensors claim
    """

    tensors: Mapping[str, Expr]
    layout: Mapping[str, tuple[tuple[str, Ranges], ...]]
    views: Mapping[str, Stacked]
    buffers: tuple[str, ...]
    problems: tuple[CheckpointError, ...]


@dataclass(frozen=True)
class Stack:
    """How all experts lie in a tensor of three dimensions: one matrix each, as a linear layer has it or transposed.

    The shape tells which it is. A square matrix is taken as a linear layer's, which is how transformers reads it.

    experts        how many there are, or None where the config does not say
    rows, columns  of each matrix as a linear layer has it; None where anything may be
    """

    experts: int | None = None
    rows: int | None = None
    columns: int | None = None

    def view(self, name: str, shape: Shape) -> Stacked | None:
        """The matrices of a tensor of that shape, as linear layers have them; None where it cannot hold them."""
        if len(shape) == 3 and self.experts in (None, shape[0]):
            for transposed, (rows, columns) in ((False, shape[1:]), (True, shape[:0:-1])):
                if self.rows in (None, rows) and self.columns in (None, columns):
                    return Stacked(Read(name), transposed)
        return None

    def __str__(self) -> str:
        one = f"[{self.rows or '...'}, {self.columns or '...'}]"
        return f"{'experts' if self.experts is None else self.experts} x {one}, or each of them transposed"


Split: TypeAlias = tuple[Ranges, ...] | Stack
"""The rows of each canonical tensor in a fused one, or how all experts lie in one tensor."""


def map_names(
    family: Family,
    names: Iterable[str],
    checkpoint: str,
    splits: Mapping[str, Split] | None = None,
    shapes: Mapping[str, Shape] | None = None,
) -> NameMap:
    """Give every tensor name of a checkpoint its canonical name; `checkpoint` is what errors call it.

    splits   for each way of fusing tensors that this checkpoint's config settles, where each one lies in it
    shapes   of the tensors, which tell how experts lie in theirs
    """
    tensors: dict[str, Expr] = {}
    layout: dict[str, tuple[tuple[str, Ranges], ...]] = {}
    views: dict[str, Stacked] = {}
    buffers: list[str] = []
    unknown: list[str] = []
    fused: dict[str, list[str]] = {}
    problems: list[CheckpointError] = []
    for name in names:
        rule = family.rule(name)
        if rule is None:
            (buffers if family.is_buffer(name) else unknown).append(name)
            continue
        split = (splits or {}).get(rule.split) if rule.split else ((),)
        if split is None:
            fused.setdefault(rule.split, []).append(name)
            continue
        held = rule.apply(name) or ()
        whole: Expr = Read(name)
        if isinstance(split, Stack):
            shape = (shapes or {}).get(name, ())
            view = split.view(name, shape)
            height = shape_of(view, {name: shape})[0] // shape[0] if view is not None else 0
            if view is None or height % len(held):
                said = f"{name} is {list(shape)}, its config.json asks for {split}"
                problems.append(CheckpointError(f"{checkpoint}: {said}. Mend config.json"))
                continue
            whole = views[name] = view
            layout[name] = _experts(held, shape[0], height // len(held))
        else:
            layout[name] = tuple(zip(held, split, strict=True))
        for canonical, ranges in layout[name]:
            if canonical in tensors:
                problems.append(
                    CheckpointError(
                        f"{checkpoint}: '{names_read(tensors[canonical])[0]}' and '{name}' both mean {canonical} in "
                        f"family '{family.name}'. Keep one of them in the checkpoint."
                    )
                )
            else:
                tensors[canonical] = rows_of(whole, ranges) if ranges else whole
    problems += [
        CheckpointError(
            f"{checkpoint}: '{first}'{f' ({len(more)} more like it)' if more else ''} is fused by '{split}', and "
            "config.json does not say how many heads, or how wide an MLP, it holds. Complete config.json"
        )
        for split, (first, *more) in fused.items()
    ]
    problems += _unexplained(family, unknown, checkpoint)
    return NameMap(tensors, layout, views, tuple(buffers), tuple(problems))


def _experts(held: tuple[str, ...], experts: int, height: int) -> tuple[tuple[str, Ranges], ...]:
    """What lies one below the other in a tensor of all experts: each of `held`, `height` rows, of the first, ..."""
    names = [name.replace("{e}", str(expert)) for expert in range(experts) for name in held]
    return tuple((name, ((place * height, (place + 1) * height),)) for place, name in enumerate(names))


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
