"""What an extraction is asked for, and what its plan says of each tensor: how a fine-tune differs from its base."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final, Literal

from polymerge.dtypes import NAMES, byte_count, dtype_code
from polymerge.errors import RecipeError, did_you_mean
from polymerge.families.expressions import Concat, Expr, Shape
from polymerge.families.rules import PARTS
from polymerge.planning.model import Model
from polymerge.planning.module_steps import wrapped_name

__all__ = ["MOST", "Difference", "Extraction", "Fate", "Wanted"]

MOST: Final = 256
"""The highest rank where each module has its own."""

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
    shape       as read; of experts [experts, rows, columns]
    fate        low rank (its difference gets factors), whole (it is kept in full if it differs), or left out
    why         the reason, if it is left out
    transposed  whether its rows are the columns of what the factors are of
    resized     whether the fine-tune's vocabulary has another number of rows than the base's
    dtype       as the fine-tune has it
    experts     the number of matrices that it holds, each of which gets factors; 0 for one that is a matrix itself
    targeted    whether PEFT is told of the parameter itself, not of its module
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
    experts: int = 0
    targeted: bool = False

    @property
    def module(self) -> str:
        """The module that the parameter is of."""
        return self.name.rpartition(".")[0]

    @property
    def key(self) -> str:
        """What has the factors: the module, or the parameter of experts."""
        return self.name if self.experts else self.module

    @property
    def sides(self) -> tuple[int, int]:
        """The dimensions [out, in] of what the factors are of; of each expert."""
        rows, columns = self.shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    def matrix(self, number: int) -> Difference:
        """The difference of an expert, as if of a matrix; itself where it is one."""
        if not self.experts:
            return self
        assert isinstance(self.tuned, Concat)
        assert isinstance(self.base, Concat)
        tuned, base = self.tuned.of[number], self.base.of[number]
        return replace(self, shape=self.shape[1:], tuned=tuned, base=base, experts=0)


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
    _names: frozenset[str] = field(repr=False)

    @cached_property
    def low_rank(self) -> tuple[Difference, ...]:
        """The differences that get factors."""
        return tuple(one for one in self.differences if one.fate == "low rank")

    @property
    def matrices(self) -> int:
        """The number of matrices that are decomposed."""
        return sum(one.experts or 1 for one in self.low_rank)

    @property
    def size(self) -> int:
        """The most bytes that the factors take."""
        code = str(dtype_code(self.wanted.dtype))
        return sum((one.experts or 1) * byte_count(code, (self.most(one), sum(one.sides))) for one in self.low_rank)

    def most(self, one: Difference) -> int:
        """The highest rank of a difference."""
        return min(self.wanted.most, *one.sides)

    def adapted(self, keys: Collection[str]) -> tuple[Difference, ...]:
        """The differences whose factors are written under one of these keys."""
        return tuple(one for one in self.low_rank if one.key in keys)

    def targets(self, keys: Collection[str]) -> dict[str, list[str]]:
        """What PEFT's `target_modules` and `target_parameters` have to say for these and no others: the last words of
        their names, or all of these where the words mean others as well.
        """
        adapted = self.adapted(keys)
        parameters = [one.name for one in adapted if one.targeted]
        modules = [one.module for one in adapted if not one.targeted]
        named = {"target_modules": self._shortest(modules, {name.rpartition(".")[0] for name in self._names}, 1)}
        return named | ({"target_parameters": self._shortest(parameters, self._names, 2)} if parameters else {})

    def _shortest(self, names: Sequence[str], every: Collection[str], words: int) -> list[str]:
        ends = {_end(name, words) for name in names}
        others = {name for name in every if _end(name, words) in ends} - set(names)
        return sorted(ends) if self.named_by and not others else sorted(names)

    def stored_name(self, one: Difference, keys: Collection[str]) -> str:
        """The name that the factors of a difference have as if of a module, beside those of these keys."""
        beside = [other.name.rpartition(".")[2] for other in self.adapted(keys) if other.module == one.module]
        return wrapped_name(one.name, beside) if one.experts else one.module


def _end(name: str, words: int) -> str:
    return ".".join(name.split(".")[-words:])
