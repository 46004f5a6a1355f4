"""Read expressions: how to obtain a tensor from those that a checkpoint stores; no values are read here.

Different layouts are joined by blocks of rows (`Rows`, `Concat`), the matrices in a tensor of three dimensions are read
one below the other (`Stacked`), a tensor in fp8 is multiplied by its scales (`Scaled`), a checkpoint with an adapter
has tensors of the two together (`Adapted`), and an adapter alone has the factors of its updates (`LowRank`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isfinite, prod
from typing import TypeAlias

from polymerge.errors import CheckpointError, RecipeError

__all__ = [
    "Adapted",
    "Concat",
    "Expr",
    "LowRank",
    "Ranges",
    "Read",
    "Rows",
    "Scaled",
    "Shape",
    "Stacked",
    "expr_from_json",
    "expr_to_json",
    "names_read",
    "replace_reads",
    "rows_of",
    "shape_of",
]


@dataclass(frozen=True)
class Read:
    """One tensor on disk."""

    name: str


@dataclass(frozen=True)
class Scaled:
    """A tensor in fp8 times its scales, each product rounded to float32.

    by     the name of the scales, of which one holds for a block of elements
    block  the size of such a block in each dimension; the last ones of a dimension may be cut off
    """

    of: Read
    by: str
    block: tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` (exclusive) of another expression, such as q in a fused qkv."""

    of: Expr
    start: int
    stop: int


@dataclass(frozen=True)
class Concat:
    """Several expressions stacked along dim 0, as in a fused tensor."""

    of: tuple[Expr, ...]


@dataclass(frozen=True)
class Stacked:
    """The matrices of a tensor stacked: [n, a, b] as [n * a, b], or each transposed, as [n * b, a]."""

    of: Read | Scaled
    transposed: bool = False

    @property
    def name(self) -> str:
        """The name of the tensor."""
        return self.of.name if isinstance(self.of, Read) else self.of.of.name


@dataclass(frozen=True)
class Adapted:
    """An expression plus `scale` times an adapter's update.

    a, b        names of the factors, [r, in] and [out, r], or [r, in, ...] and [out, r, 1, ...] of a convolution, whose
                product b a is added; without `a`, `b` is added itself
    transposed  the product is added transposed: embeddings, and layers that store [in, out]
    expert      where factors are those of several matrices: which one's, and of how many. `a` has them one after the
                other, `b` all of one rank side by side
    """

    of: Expr
    a: str | None
    b: str
    scale: float
    transposed: bool = False
    expert: tuple[int, int] | None = None


@dataclass(frozen=True)
class LowRank:
    """An update [out, in] of which only two factors are stored: `scale` times b a.

    a, b     names of the factors, [r, in] and [out, r]
    bias     name of its bias [out], which is multiplied by `scale` as well; None without one
    experts  the number of matrices that have an update each, as in `Adapted.expert`; 0 for one without experts
    swapped  whether its updates are the transposes of these, for factors that lie as up to PEFT 0.18
    """

    a: str
    b: str
    scale: float
    bias: str | None = None
    experts: int = 0
    swapped: bool = False


Expr: TypeAlias = Read | Scaled | Rows | Concat | Stacked | Adapted | LowRank
Shape: TypeAlias = tuple[int, ...]
Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""Blocks of rows, each as (start, stop)."""


def rows_of(expr: Expr, ranges: Ranges) -> Expr:
    """The rows of an expression that are in `ranges`, stacked in that order."""
    blocks = tuple(Rows(expr, start, stop) for start, stop in ranges)
    return blocks[0] if len(blocks) == 1 else Concat(blocks)


def replace_reads(expr: Expr, change: Callable[[str], Expr]) -> Expr:
    """The expression with every stored tensor replaced by `change(name)`.

    For one of several matrices that is another stored tensor, or their view with something done to it.
    """
    match expr:
        case Read(name) | Scaled(Read(name)):
            return change(name)
        case Rows(of, start, stop):
            return Rows(replace_reads(of, change), start, stop)
        case Concat(of):
            return Concat(tuple(replace_reads(block, change) for block in of))
        case Stacked(_, transposed):
            changed = change(expr.name)
            return Stacked(changed, transposed) if isinstance(changed, Read | Scaled) else changed
        case Adapted(of):
            return replace(expr, of=replace_reads(of, change))
        case LowRank():
            return expr


def names_read(expr: Expr) -> tuple[str, ...]:
    """The stored names that an expression reads, in reading order, each once."""
    match expr:
        case Read(name):
            return (name,)
        case Scaled(Read(name), by):
            return (name, by)
        case Rows(of) | Stacked(of):
            return names_read(of)
        case Concat(of):
            return tuple(dict.fromkeys(name for block in of for name in names_read(block)))
        case Adapted(of, a, b):
            return (*names_read(of), *((a, b) if a is not None else (b,)))
        case LowRank(a, b, _, bias):
            return (a, b) if bias is None else (a, b, bias)


def shape_of(expr: Expr, shapes: Mapping[str, Shape]) -> Shape:
    """The shape of an expression, given the shapes on disk; raises CheckpointError if the shapes do not fit."""
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
        case Stacked(of, transposed):
            whole = shape_of(of, shapes)
            if len(whole) != 3:
                raise CheckpointError(f"{expr.name}: shape {list(whole)} is not one of several matrices")
            count, first, second = whole
            return (count * second, first) if transposed else (count * first, second)
        case Scaled(of, by, block):
            whole = shape_of(of, shapes)
            scales = prod(-(-size // width) for size, width in zip(whole, block, strict=False))
            if len(whole) != len(block) or scales != prod(shapes.get(by, (scales,))):
                raise CheckpointError(f"{by}: is no scale for each {list(block)} of {of.name} {list(whole)}")
            return whole
        case Adapted(of, a, b, _, transposed):
            whole, update = shape_of(of, shapes), shape_of(Read(b) if a is None else LowRank(a, b, 1.0), shapes)
            if (update[::-1] if transposed else update) != whole:
                raise CheckpointError(f"{b}: an update of shape {list(update)} for {list(whole)}")
            return whole
        case LowRank(a, b):
            below, above = shape_of(Read(a), shapes), shape_of(Read(b), shapes)
            fit = len(below) == len(above) > 1 and below[0] == above[1] and set(above[2:]) <= {1}
            if not fit:
                raise CheckpointError(f"{a}, {b}: shapes {list(below)} and {list(above)} are not of two factors")
            return above[0], *below[1:]


def expr_to_json(expr: Expr) -> object:
    """An expression as JSON: a name, or a mapping with a key for its kind, such as `rows` or `concat`."""
    match expr:
        case Read(name):
            return name
        case Scaled(Read(name), by, block):
            return {"scaled": name, "by": by, "block": list(block)}
        case Rows(of, start, stop):
            return {"rows": [start, stop], "of": expr_to_json(of)}
        case Concat(of):
            return {"concat": [expr_to_json(block) for block in of]}
        case Stacked(of, transposed):
            return {"stacked": expr_to_json(of), "transposed": transposed}
        case Adapted(of, a, b, scale, transposed, expert):
            held = {"adapted": expr_to_json(of), "a": a, "b": b, "scale": scale, "transposed": transposed}
            return held | ({} if expert is None else {"expert": list(expert)})
        case LowRank(a, b, scale, bias, experts, swapped):
            held = {"low_rank": [a, b], "scale": scale, "bias": bias}
            return held | ({"experts": experts, "swapped": swapped} if experts else {})


def expr_from_json(value: object) -> Expr:
    """The inverse of `expr_to_json`; raises RecipeError for anything that it does not write."""
    match value:
        case str(name):
            return Read(name)
        case {"scaled": str(name), "by": str(by), "block": [_, *_] as block, **rest} if not rest:
            if not all(type(size) is int and size > 0 for size in block):
                raise RecipeError(f"not a read expression: block {block!r} of '{name}'. It is a list of sizes.")
            return Scaled(Read(name), by, tuple(block))
        case {"rows": [int(start), int(stop)], "of": of, **rest} if not rest:
            return Rows(expr_from_json(of), start, stop)
        case {"concat": [_, *_] as blocks, **rest} if not rest:
            return Concat(tuple(expr_from_json(block) for block in blocks))
        case {"stacked": (str() | {"scaled": _}) as of, "transposed": bool(flip), **rest} if not rest:
            whole = expr_from_json(of)
            assert isinstance(whole, Read | Scaled)
            return Stacked(whole, flip)
        case {
            "adapted": of,
            "a": str() | None as a,
            "b": str(b),
            "scale": float(scale),
            "transposed": bool(flip),
            **rest,
        } if not set(rest) - {"expert"} and isfinite(scale):
            match rest:
                case {"expert": [int(which), int(count)], **more} if not more and 0 <= which < count:
                    return Adapted(expr_from_json(of), a, b, scale, flip, (which, count))
                case {"expert": _}:
                    raise RecipeError(f"not a read expression: expert {rest['expert']!r} of '{b}'.")
            return Adapted(expr_from_json(of), a, b, scale, flip)
        case {
            "low_rank": [str(a), str(b)],
            "scale": float(scale),
            "bias": str() | None as bias,
            **rest,
        } if not rest and isfinite(scale):
            return LowRank(a, b, scale, bias)
        case {
            "low_rank": [str(a), str(b)],
            "scale": float(scale),
            "bias": None,
            "experts": int(experts),
            "swapped": bool(swapped),
            **rest,
        } if not rest and experts > 0:
            return LowRank(a, b, scale, None, experts, swapped)
        case _:
            raise RecipeError(
                f"not a read expression: {value!r:.200}. It is a name, {{scaled}}, {{rows, of}}, {{concat}}, "
                "{stacked}, {adapted} or {low_rank}."
            )
