"""Plan the extraction of a LoRA from a fine-tune: which tensors differ from the base's in a way that factors can hold.

Where the class holds all experts of a layer in one parameter, each of them gets factors, however they lie on disk. An
adapter names modules as the base's class has them in memory, whatever its checkpoint calls them. Where transformers has
that class, it is asked; else the stored names are taken for those in memory.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Final

from polymerge.checkpoints.files import class_names
from polymerge.checkpoints.loading import named_class
from polymerge.errors import RecipeError, collecting, refuse
from polymerge.families.blueprint import Blueprint, NotBuiltError, blueprint
from polymerge.families.expressions import Concat, Expr, Read, Rows, Shape, names_read, replace_reads, shape_of
from polymerge.families.rules import text_layer
from polymerge.planning.adapter_places import Block, Parameters
from polymerge.planning.difference import Difference, Extraction, Fate, Wanted
from polymerge.planning.fit import layer_pattern
from polymerge.planning.inputs import open_each
from polymerge.planning.model import EMBEDDING, HEAD, VOCABULARY, Model, part_of
from polymerge.recipe.overrides import matches

__all__ = ["plan_extraction"]

_FEW: Final = 3

_MOVED: Final = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Modules that PEFT takes for experts of a time when these were modules, if they are named as such."""


def plan_extraction(
    tuned: str | os.PathLike[str],
    base: str | os.PathLike[str],
    wanted: Wanted,
    ignore: Sequence[str] = (),
) -> Extraction:
    """Compare the headers of a fine-tune and its base, and decide what becomes of each tensor's difference.

    tuned, base  checkpoints as in a recipe: folders, hub ids or BASE+ADAPTER; their names may be of other generations
    ignore       globs on names of tensors as stored that are left out of both

    raises Refused with every problem: settings, checkpoints that cannot be opened or are quantized, tensors of another
    shape, vocabularies that differ and are neither saved nor excluded, globs that match nothing, nothing to extract.
    """
    with collecting(needed=True):
        refuse(*wanted.problems())
        opened = open_each([os.fspath(tuned), os.fspath(base)], ignore)
        if len(opened) == 1 and os.fspath(tuned) != os.fspath(base):
            opened = []  # the other one could not be opened
        if len({model.path for model in opened}) == 1 and opened[0].checkpoint.adapter is None:
            refuse(RecipeError(f"{tuned} and {base} are one and the same model. Name the fine-tune, and its base"))
    one, other = (opened[0], opened[-1])
    return _Comparing(one, other, wanted).extraction()


class _Comparing:
    """The comparison of two opened models, tensor by tensor of the base in memory."""

    def __init__(self, tuned: Model, base: Model, wanted: Wanted) -> None:
        self.tuned, self.base, self.wanted = tuned, base, wanted
        self.here, self.there = Parameters(tuned), Parameters(base)
        self.built, self.why = _built(base)
        self.linear: Mapping[str, bool] = self.built.linear if self.built else {}
        self.stacked: Mapping[str, bool] = self.built.stacked if self.built else {}
        self.routers = self.built.routers if self.built else frozenset[str]()
        names = list(self.linear) if self.built else list(self.there.layout)
        self.reading = self.there.reading_of(names)
        self.missing: dict[str, list[str]] = defaultdict(list)
        self.shapes: dict[str, list[str]] = defaultdict(list)
        self.elsewhere: list[str] = []

    def extraction(self) -> Extraction:
        """The whole of it; refuses what does not fit."""
        names = self._names()
        with collecting(needed=True):
            found = [one for name in names if (one := self._difference(name)) is not None]
            refuse(*self._misfits(), *self._unmatched(found))
            if not self.wanted.match and not any(one.fate == "low rank" for one in found):
                refuse(
                    RecipeError(
                        f"'{self.base.label}' has no linear layers among the tensors that are asked for "
                        f"({', '.join(self.wanted.match or self.wanted.parts)}). Say other `parts` or `match`"
                    )
                )
        return Extraction(
            self.tuned, self.base, self.wanted, tuple(_with_siblings(found)), self.built.name if self.built else "",
            next(filter(self._borrowed, self.built.shapes if self.built else ()), ""), tuple(self._warnings(found)),
            frozenset(names),
        )  # fmt: skip

    def _names(self) -> list[str]:
        """The parameters of the base, each once; of a tied pair only the embedding."""
        if self.built is None:
            return [name for name in self.there.layout if not self._borrowed(name)]
        numbers = [name for name in self.built.shapes if name not in self.built.integers]
        return [name for name in numbers if not self._borrowed(name)]

    def _borrowed(self, name: str) -> bool:
        return self.base.ties_head and self.tuned.ties_head and self._canonical(name) == HEAD

    def _canonical(self, name: str) -> str:
        if name in self.there.layout and name not in self.stacked:
            return "+".join(canonical for canonical, _ in self.there.layout[name])
        known = self.built.canonical.get(name, "") if self.built else ""
        return self.reading.joint(name) or known

    def _difference(self, name: str) -> Difference | None:
        """One tensor and its fate; None if it is not compared, with a note where that is a misfit."""
        canonical = self._canonical(name)
        if not canonical or any(_matched(canonical, glob) for glob in self.wanted.exclude):
            return None
        base, tuned = (self._expr(parameters, name, canonical) for parameters in (self.there, self.here))
        if base is None:
            return None  # the class has it, the checkpoint does not: a buffer, or a part that is not stored
        fate, why = self._fate(name, canonical, self._shape(name, base, self.base))
        if tuned is None:
            if fate == "low rank" or part_of(canonical) in self.tuned.parts:
                self.missing[layer_pattern(canonical)].append(canonical)
            else:
                self.elsewhere.append(part_of(canonical))
            return None
        shapes = [self._shape(name, expr, model) for expr, model in ((tuned, self.tuned), (base, self.base))]
        resized = shapes[0] != shapes[1]
        if resized and not (fate == "whole" and canonical in VOCABULARY and shapes[0][1:] == shapes[1][1:]):
            self.shapes[layer_pattern(canonical)].append(f"{list(shapes[0])}|{list(shapes[1])}")
            return None
        stored = self.tuned.entries[names_read(tuned)[0]]
        numbers = self.tuned.has_numbers(stored.name) and self.base.has_numbers(names_read(base)[0])
        if not numbers:
            return None
        dtype = "BF16" if stored.name in self.tuned.fp8.scaled else stored.dtype
        if name in self.stacked:
            turned = self._lies_turned(name, shapes[0]) != self.stacked[name]
            return Difference(
                name, canonical, shapes[0], tuned, base, dtype, fate, why, turned, False, shapes[0][0], True
            )
        moved = bool(self.stacked) and name.split(".")[-2] in _MOVED
        turned, targeted = self.linear.get(name, False), name in self.routers or moved
        return Difference(name, canonical, shapes[0], tuned, base, dtype, fate, why, turned, resized, targeted=targeted)

    def _shape(self, name: str, expr: Expr, model: Model) -> Shape:
        """The shape of a parameter as read, [experts, rows, columns] of one that holds experts."""
        if name in self.stacked:
            assert isinstance(expr, Concat)
            return len(expr.of), *shape_of(expr.of[0], model.shapes)[-2:]
        return shape_of(expr, model.shapes)

    def _lies_turned(self, name: str, shape: Shape) -> bool:
        """Whether the matrices of experts lie transposed in memory, beside how they are read; a square one is as the
        others are.
        """
        assert self.built is not None
        if shape[1] != shape[2]:
            return self.built.shapes[name] != shape
        return self._turned == {True}

    @cached_property
    def _turned(self) -> set[bool]:
        """Whether the matrices of experts that are not square lie transposed in memory."""
        assert self.built is not None
        exprs = {name: self._expr(self.there, name, self._canonical(name)) for name in self.stacked}
        shapes = {name: self._shape(name, expr, self.base) for name, expr in exprs.items() if expr is not None}
        return {self.built.shapes[name] != shape for name, shape in shapes.items() if shape[1] != shape[2]}

    def _expr(self, parameters: Parameters, name: str, canonical: str) -> Expr | None:
        if name in self.stacked:
            return self._of_experts(parameters, name)
        place = parameters.place(name, self.reading)
        if place is None:
            place = tuple(block for one in (canonical,) if (block := parameters.blocks.get(one)) is not None)
        return _joined(parameters, place) if place else None

    def _of_experts(self, parameters: Parameters, name: str) -> Concat | None:
        """The matrices of experts one after the other, each as in a linear layer where the family tells."""
        assert self.built is not None
        held = self.reading.canonical(name)
        lying = len(tuple(parameters.of_experts(held))) // len(held) if any(".{e}." in one for one in held) else 0
        places = parameters.places_of_experts(name, lying or self.built.shapes[name][0], self.reading)
        if places is None:
            return None
        read = tuple(_joined(parameters, place) for place in places)
        whole = shape_of(read[0], parameters.base.shapes)
        if len(whole) == 2:
            return Concat(read)
        return Concat(tuple(Rows(read[0], expert, expert + 1) for expert in range(whole[0])))

    def _fate(self, name: str, canonical: str, shape: Shape) -> tuple[Fate, str]:
        wanted, first = self.wanted, canonical.partition("+")[0]
        linear = name in self.linear or name in self.routers
        linear = linear if self.built else _seems_linear(name, first, shape)
        asked = any(_matched(canonical, glob) for glob in wanted.match)
        in_parts = self.base.generic or part_of(first) in wanted.parts
        whole = any(_matched(canonical, glob) for glob in wanted.save)
        stacked = name in self.stacked
        matrix = stacked or (linear and len(shape) == 2)
        if matrix and (asked or (not wanted.match and in_parts and first != HEAD)) and not whole:
            return "low rank", ""
        if stacked and whole:
            return "left out", "experts that are one tensor are not kept in full"
        if self.built and ".experts." in first and len(self.built.shapes[name]) == 3 and not stacked:
            return "left out", "experts that are one tensor, of a name that PEFT's files do not tell from others"
        if whole:
            return "whole", ""
        if (linear or stacked) and first != HEAD:
            return "left out", "not asked for"
        kind = "rows of the vocabulary" if first in VOCABULARY else "a bias" if name.endswith("bias") else ""
        return "left out", kind or "no linear layer"

    def _misfits(self) -> Iterator[RecipeError]:
        one, other = f"'{self.tuned.label}'", f"base '{self.base.label}'"
        for pattern, names in self.missing.items():
            yield RecipeError(
                f"{pattern}{_count(names)}: {other} has it, {one} does not. Name the base that it was tuned from, or "
                "name it in exclude"
            )
        for pattern, shapes in self.shapes.items():
            ours, _, theirs = shapes[0].partition("|")
            way = "Name the base that it was tuned from, or name it in exclude"
            if pattern in (EMBEDDING, HEAD):
                way = f"Say save: {pattern} to keep the fine-tune's vocabulary in full, or name it in exclude"
            yield RecipeError(f"{pattern}{_count(shapes)}: {one} is {ours}, {other} is {theirs}. {way}")

    def _unmatched(self, found: Sequence[Difference]) -> Iterator[RecipeError]:
        names = self.built.shapes if self.built else self.there.layout
        every = {one for name in names for one in self._canonical(name).split("+") if one}
        for where in ("match", "exclude", "save"):
            for glob in getattr(self.wanted, where):
                if not any(matches(name, glob) for name in every):
                    yield RecipeError(
                        f"{where}: '{glob}' matches no tensor; globs are matched against entire canonical names, such "
                        f"as {min(every, default='none')}"
                    )
        for glob in self.wanted.match:
            held = [one for one in found if _matched(one.canonical, glob)]
            if held and not any(one.fate == "low rank" for one in held):
                yield RecipeError(
                    f"match: '{glob}' matches no linear layer: {held[0].canonical} is {held[0].why or 'kept in full'}. "
                    "Tensors of other kinds are kept in full by `save`"
                )

    def _warnings(self, found: Sequence[Difference]) -> Iterator[str]:
        for model in dict.fromkeys((self.tuned, self.base)):
            yield from model.remarks()
        if self.built is None:
            yield (
                f"'{self.base.label}': the adapter has the names of its tensors as stored, which PEFT looks for in "
                f"memory: {self.why}"
            )
        if any(one.experts for one in found if one.fate == "low rank"):
            yield (
                "all experts of a layer are one parameter in memory: each gets factors, of one rank for all, under "
                "target_parameters, in the layout of PEFT 0.19 and later"
            )
        if self.elsewhere:
            parts = ", ".join(dict.fromkeys(self.elsewhere))
            yield f"'{self.tuned.label}' has no {parts}: only what both have is compared"
        covered = {one for name in self._names() for one in self._canonical(name).split("+")}
        extra = [name for name in self.tuned.tensors if name not in self.base.tensors and name not in covered]
        if extra:
            kinds = list(dict.fromkeys(map(layer_pattern, extra)))
            more = ", ..." if len(kinds) > _FEW else ""
            yield (
                f"'{self.tuned.label}' has {len(extra)} tensors that its base has not, which no adapter can hold: "
                f"{', '.join(kinds[:_FEW])}{more}"
            )


def _built(base: Model) -> tuple[Blueprint | None, str]:
    """The class of a base, built without its weights; None and the reason if there is none."""
    config = base.checkpoint.config
    try:
        found = blueprint(config, len(base.stored))
    except NotBuiltError as error:
        return None, str(error)
    if (names := class_names(config)) and named_class(config) is None:  # of the same model type, and other names
        return None, f"transformers has no class {' or '.join(names)}"
    return found, ""


def _joined(parameters: Parameters, place: Sequence[Block]) -> Expr:
    """What is read at a place, with the changes of an adapter."""
    adapted = parameters.base.adapted
    blocks = tuple(replace_reads(parameters.read(block), lambda own: adapted.get(own, Read(own))) for block in place)
    return blocks[0] if len(blocks) == 1 else Concat(blocks)


def _seems_linear(name: str, canonical: str, shape: Shape) -> bool:
    """Whether a stored tensor is the weight of a linear layer, as far as names and shapes tell."""
    inside = text_layer(canonical) is not None or "embed" not in canonical
    return name.endswith(".weight") and len(shape) == 2 and inside and canonical not in VOCABULARY


def _with_siblings(found: Sequence[Difference]) -> Iterator[Difference]:
    """The differences, with all of a module kept in full where a tensor of it is: PEFT saves modules.

    Only the bias of a module with factors is kept for itself.
    """
    low_rank = {one.module for one in found if one.fate == "low rank" and not one.targeted}
    targeted = {one.module for one in found if one.experts or (one.targeted and one.fate == "low rank")}
    outer = {one.module[:stop] for one in found for stop, letter in enumerate(one.module) if letter == "."}
    whole = {one.module for one in found if one.fate == "whole"} - low_rank - outer - targeted
    for one in found:
        if one.fate == "whole" and one.module in targeted:
            why = "lies beside a parameter that has factors of its own, and PEFT saves whole modules only"
            yield replace(one, fate="left out", why=why)
        elif one.fate == "whole" and one.module in outer:
            yield replace(one, fate="left out", why="lies beside modules, and PEFT saves whole modules only")
        elif one.fate == "left out" and one.module in whole:
            yield replace(one, fate="whole", why="")
        else:
            yield one


def _matched(canonical: str, glob: str) -> bool:
    return any(matches(name, glob) for name in canonical.split("+"))


def _count(found: Sequence[Any]) -> str:
    return f" ({len(found)} tensors)" if len(found) > 1 else ""
