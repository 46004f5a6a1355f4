"""Plan the extraction of a LoRA from a fine-tune: which tensors differ from the base's in a way that factors can hold.

An adapter names modules as the base's class has them in memory, whatever its checkpoint calls them. Where transformers
has that class, it is asked; else the stored names are taken for those in memory.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, Literal

from polymerge.checkpoints.files import class_names
from polymerge.checkpoints.loading import named_class
from polymerge.dtypes import NAMES, dtype_code
from polymerge.errors import RecipeError, collecting, did_you_mean, refuse
from polymerge.families.blueprint import Blueprint, NotBuiltError, blueprint
from polymerge.families.expressions import Concat, Expr, Read, Shape, names_read, replace_reads, shape_of
from polymerge.families.rules import PARTS, text_layer
from polymerge.planning.adapter_places import Parameters
from polymerge.planning.fit import layer_pattern
from polymerge.planning.inputs import open_each
from polymerge.planning.model import EMBEDDING, HEAD, VOCABULARY, Model, part_of
from polymerge.recipe.overrides import matches

__all__ = ["MOST", "Difference", "Extraction", "Wanted", "plan_extraction"]

MOST: Final = 256
"""The highest rank where each module has its own."""

_FEW: Final = 3

Fate = Literal["low rank", "whole", "left out"]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is extracted, and how.

    rank      of every module; or None with `energy`
    energy    in (0, 1]: each module gets the smallest rank that holds this share of the squared norm of its difference
    max_rank  the highest rank that `energy` may give
    parts     of the model whose linear layers get factors
    match     globs on canonical names: only these linear layers, of any part; the head of a language model only so
    exclude   globs on canonical names that are left out, and not compared
    save      globs on canonical names of other tensors to keep in full where they differ (`modules_to_save`)
    dtype     of the factors
    """

    rank: int | None = None
    energy: float | None = None
    max_rank: int = MOST
    parts: tuple[str, ...] = ("text",)
    match: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    save: tuple[str, ...] = ()
    dtype: str = "float32"

    @property
    def most(self) -> int:
        """The highest rank."""
        return self.rank if self.rank is not None else self.max_rank

    def problems(self) -> Iterator[RecipeError]:
        """Errors in these settings."""
        if (self.rank is None) == (self.energy is None):
            yield RecipeError(
                "say how many components of each module to keep: `rank`, or `energy` for a rank of its own for each"
            )
        if self.rank is not None and self.rank < 1:
            yield RecipeError(f"rank: {self.rank} is not at least 1")
        if self.max_rank < 1:
            yield RecipeError(f"max_rank: {self.max_rank} is not at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            yield RecipeError(f"energy: {self.energy:g} is no share of the whole; say one such as 0.95")
        for part in self.parts:
            if part not in PARTS:
                yield RecipeError(f"parts: there is no part '{part}'.{did_you_mean(part, PARTS)}")
        if dtype_code(self.dtype) is None:
            yield RecipeError(f"dtype: '{self.dtype}' cannot be written.{did_you_mean(self.dtype, NAMES)}")


@dataclass(frozen=True)
class Difference:
    """One tensor of the model in memory, and where it lies in the fine-tune and in its base.

    name        of the parameter, as the base's class has it
    canonical   its canonical names, joined by `+` if it is fused
    fate        low rank (its difference gets factors), whole (it is kept in full if it differs), or left out
    why         the reason, if it is left out
    transposed  whether its rows are the columns of a linear layer
    resized     whether the fine-tune's vocabulary has another number of rows than the base's
    dtype       as the fine-tune has it
    """

    name: str
    canonical: str
    shape: Shape
    tuned: Expr
    base: Expr
    dtype: str
    fate: Fate
    why: str = ""
    transposed: bool = False
    resized: bool = False

    @property
    def module(self) -> str:
        """The module that the parameter is of."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class Extraction:
    """What is read, compared and written; see `plan_extraction`.

    named_by  the class that the names are of; empty if they are the stored ones
    tied      the name of the head where both models tie it to the embedding; empty otherwise
    """

    tuned: Model
    base: Model
    wanted: Wanted
    differences: tuple[Difference, ...]
    named_by: str
    tied: str
    warnings: tuple[str, ...]
    _modules: frozenset[str] = field(repr=False)

    @cached_property
    def low_rank(self) -> tuple[Difference, ...]:
        """The differences that get factors."""
        return tuple(one for one in self.differences if one.fate == "low rank")

    def target_modules(self, names: Sequence[str]) -> list[str]:
        """What PEFT's `target_modules` has to say for these modules and no others: the last words of their names, or
        all of these where the words mean other modules as well.
        """
        ends = {name.rpartition(".")[2] for name in names}
        others = {name for name in self._modules if name.rpartition(".")[2] in ends} - set(names)
        return sorted(ends) if self.named_by and not others else sorted(names)


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
        modules = frozenset(name.rpartition(".")[0] for name in names)
        return Extraction(
            self.tuned, self.base, self.wanted, tuple(_with_siblings(found)), self.built.name if self.built else "",
            next(filter(self._borrowed, self.built.shapes if self.built else ()), ""), tuple(self._warnings()), modules,
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
        if name in self.there.layout:
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
        fate, why = self._fate(name, canonical, shape_of(base, self.base.shapes))
        if tuned is None:
            if fate == "low rank" or part_of(canonical) in self.tuned.parts:
                self.missing[layer_pattern(canonical)].append(canonical)
            else:
                self.elsewhere.append(part_of(canonical))
            return None
        shapes = [shape_of(expr, model.shapes) for expr, model in ((tuned, self.tuned), (base, self.base))]
        resized = shapes[0] != shapes[1]
        if resized and not (fate == "whole" and canonical in VOCABULARY and shapes[0][1:] == shapes[1][1:]):
            self.shapes[layer_pattern(canonical)].append(f"{list(shapes[0])}|{list(shapes[1])}")
            return None
        stored = self.tuned.entries[names_read(tuned)[0]]
        numbers = self.tuned.has_numbers(stored.name) and self.base.has_numbers(names_read(base)[0])
        if not numbers:
            return None
        dtype = "BF16" if stored.name in self.tuned.fp8.scaled else stored.dtype
        turned = self.linear.get(name, False)
        return Difference(name, canonical, shapes[0], tuned, base, dtype, fate, why, turned, resized)

    def _expr(self, parameters: Parameters, name: str, canonical: str) -> Expr | None:
        model = parameters.base
        place = parameters.place(name, self.reading)
        if place is None:
            held = self.reading.canonical(name)
            place = tuple(parameters.of_experts(held) if any(".{e}." in one for one in held) else ())
            place = place or tuple(block for one in (canonical,) if (block := parameters.blocks.get(one)) is not None)
            if not place:
                return None
        blocks = tuple(
            replace_reads(parameters.read(block), lambda own: model.adapted.get(own, Read(own))) for block in place
        )
        return blocks[0] if len(blocks) == 1 else Concat(blocks)

    def _fate(self, name: str, canonical: str, shape: Shape) -> tuple[Fate, str]:
        wanted, first = self.wanted, canonical.partition("+")[0]
        linear = name in self.linear if self.built else _seems_linear(name, first, shape)
        asked = any(_matched(canonical, glob) for glob in wanted.match)
        in_parts = self.base.generic or part_of(first) in wanted.parts
        whole = any(_matched(canonical, glob) for glob in wanted.save)
        if linear and len(shape) == 2 and (asked or (not wanted.match and in_parts and first != HEAD)) and not whole:
            return "low rank", ""
        if self.built and ".experts." in first and len(self.built.shapes[name]) == 3:
            return "left out", "experts that are one tensor"
        if whole:
            return "whole", ""
        if linear and first != HEAD:
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

    def _warnings(self) -> Iterator[str]:
        for model in dict.fromkeys((self.tuned, self.base)):
            yield from model.remarks()
        if self.built is None:
            yield (
                f"'{self.base.label}': the adapter has the names of its tensors as stored, which PEFT looks for in "
                f"memory: {self.why}"
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


def _seems_linear(name: str, canonical: str, shape: Shape) -> bool:
    """Whether a stored tensor is the weight of a linear layer, as far as names and shapes tell."""
    inside = text_layer(canonical) is not None or "embed" not in canonical
    return name.endswith(".weight") and len(shape) == 2 and inside and canonical not in VOCABULARY


def _with_siblings(found: Sequence[Difference]) -> Iterator[Difference]:
    """The differences, with all of a module kept in full where a tensor of it is: PEFT saves modules.

    Only the bias of a module with factors is kept for itself.
    """
    low_rank = {one.module for one in found if one.fate == "low rank"}
    outer = {one.module[:stop] for one in found for stop, letter in enumerate(one.module) if letter == "."}
    whole = {one.module for one in found if one.fate == "whole"} - low_rank - outer
    for one in found:
        if one.fate == "whole" and one.module in outer:
            yield replace(one, fate="left out", why="lies beside modules, and PEFT saves whole modules only")
        elif one.fate == "left out" and one.module in whole:
            yield replace(one, fate="whole", why="")
        else:
            yield one


def _matched(canonical: str, glob: str) -> bool:
    return any(matches(name, glob) for name in canonical.split("+"))


def _count(found: Sequence[Any]) -> str:
    return f" ({len(found)} tensors)" if len(found) > 1 else ""
