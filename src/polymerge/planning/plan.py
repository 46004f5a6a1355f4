"""A plan: every tensor's fate, as plain data that can be printed, stored, compared and run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Final, Literal, TypeAlias, get_args

from polymerge.checkpoints import Checkpoint
from polymerge.checkpoints.identity import Stamp
from polymerge.dtypes import byte_count
from polymerge.families.expressions import (
    Adapted,
    Concat,
    Expr,
    Ranges,
    Read,
    Rows,
    Stacked,
    expr_to_json,
    rows_of,
    shape_of,
)
from polymerge.recipe.parameters import Setting
from polymerge.tables import Table

__all__ = [
    "FATES",
    "FORMAT",
    "IGNORED",
    "PREFIX",
    "Companions",
    "Fate",
    "Input",
    "Layout",
    "LeftOut",
    "Lora",
    "Piece",
    "Plan",
]
__all__ += ["Step"]

Fate = Literal["merged", "folded", "copied", "tied"]
FATES: Final[tuple[Fate, ...]] = get_args(Fate)

Layout: TypeAlias = Literal["checkpoint", "peft", "llava"]
"""How an output lies on disk: as a checkpoint for transformers, or as an adapter, in PEFT's files or in LLaVA's."""

PREFIX: Final = "base_model.model."
"""What PEFT puts before the name of every parameter."""

FORMAT = 5


@dataclass(frozen=True)
class Input:
    """One checkpoint or adapter that the merge reads.

    label        its short name in messages
    source, path as the recipe has it, and the folder or file it was found in
    adapter      the folder of the adapter that stands with it, if one does
    family       name of the family its tensor names were read with
    tensors, size  how many tensors it holds, and their bytes
    headers      sha256 over the names, dtypes, shapes and order of its tensors
    files        of an adapter, what became of each weight file in its folder
    wrappers     what is taken off their names as stored (see `checkpoints.names`); all other names here are without
    kind         whether it is a checkpoint, be it with an adapter, or an adapter alone
    opened       its headers as the plan was made from them, in the process that made it; of an adapter alone as well
    stamps       of its files at that time
    """

    label: str
    source: str
    path: str
    family: str
    tensors: int
    size: int
    headers: str
    adapter: str = ""
    files: Mapping[str, str] = field(default_factory=dict, hash=False)
    wrappers: tuple[str, ...] = ()
    kind: Literal["checkpoint", "adapter"] = "checkpoint"
    opened: Checkpoint | None = field(default=None, compare=False, repr=False)
    stamps: tuple[Stamp, ...] = field(default=(), compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "opened": None, "stamps": ()}  # another process opens it for itself


@dataclass(frozen=True)
class Piece:
    """Rows of an output tensor that come from one place: merged by a setting, or copied.

    canonical  the name that joins the models' tensors, and that random draws are keyed by
    rows       blocks of rows of the output tensor, stacked in this order; ((0, 1),) for a tensor without dimensions.
               Where its step has a view, they are rows of that
    setting    which of the plan's settings merges it; None where the rows are the template's
    reads      where each model's rows are, in the models' order; without a setting, what the rows are instead of the
               template's own bytes
    inputs     the inputs that `reads` are of, where that is not every model in order
    base       where the base's rows are, for methods on deltas
    twin       the canonical tensor that this one may be a copy of: the embedding, for a head that is stored beside it
               although the config ties the two. Random draws are keyed by that name, so that copies stay copies, and
               what holds the same numbers counts once
    """

    canonical: str
    rows: Ranges
    setting: int | None = None
    reads: tuple[Expr, ...] = ()
    base: Expr | None = None
    inputs: tuple[int, ...] = ()
    twin: str = ""


@dataclass(frozen=True)
class Lora:
    """The factors of a module of an adapter, as the output stores them: a [rank, in] and b [out, rank].

    scaling    what b a is multiplied by, as adapter_config.json says it
    dtypes     of a and b
    bias       whether b has a bias, [out]
    embedding  whether it is of an embedding, whose factors PEFT names in a way of their own
    """

    rank: int
    scaling: float
    dtypes: tuple[str, str]
    bias: bool = False
    embedding: bool = False


@dataclass(frozen=True)
class Step:
    """One tensor of the output, under the template's name, and what becomes of it.

    Of an adapter also one module, by its name in the base; its only piece reads factors (`LowRank`), and its shape is
    that of the update, [out, in].

    name    the template's own; or, where its adapter parts a head from the embedding that it was tied to, the name that
            the template's layout has for the one that it does not store
    fate    merged (at least one piece is), folded (the template's, changed by its adapter), copied byte for byte, or
            tied (the same storage as tensor `same_as`)
    dtype   of the output; `source_dtype` is the template's, which a copied tensor keeps
    reason  why it is not merged, or what a merged tensor's copied rows are
    view    how pieces see it, where that is not as it lies
    lora    the factors that a module is stored as
    """

    name: str
    canonical: str
    fate: Fate
    dtype: str
    source_dtype: str
    shape: tuple[int, ...]
    reason: str = ""
    pieces: tuple[Piece, ...] = ()
    same_as: str = ""
    view: Stacked | None = None
    lora: Lora | None = None

    @property
    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What is written of it: the dtype and shape of each tensor by its name; nothing of what is tied."""
        if self.fate == "tied":
            return {}
        if self.lora is None:
            return {self.name: (self.dtype, self.shape)}
        (out, width), rank, (a, b) = self.shape, self.lora.rank, self.lora.dtypes
        ends = ("lora_embedding_A", "lora_embedding_B") if self.lora.embedding else ("lora_A.weight", "lora_B.weight")
        tensors = {ends[0]: (a, (rank, width)), ends[1]: (b, (out, rank))}
        bias = {"lora_B.bias": (b, (out,))} if self.lora.bias else {}
        return {f"{PREFIX}{self.name}.{end}": held for end, held in {**tensors, **bias}.items()}

    @property
    def transposed(self) -> bool:
        """Whether what pieces see as a row is a column of a matrix in it."""
        return self.view is not None and self.view.transposed

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of a row of it."""
        return shape_of(self.view or Read(self.name), {self.name: self.shape})[1:]

    def turns(self, piece: Piece) -> bool:
        """Whether what is a row of a piece is a column in the file of an input, or of the output."""
        return self.transposed or any(map(_transposed, (*piece.reads, piece.base)))

    def rows(self, ranges: Ranges) -> Expr:
        """What the template has in some rows of it."""
        return rows_of(self.view or Read(self.name), ranges)

    @property
    def size(self) -> int:
        """Bytes that it takes in the output."""
        return sum(byte_count(*held) for held in self.stored.values())


IGNORED: Final = "ignored by the recipe"
"""The reason of what `ignore` leaves out."""


@dataclass(frozen=True)
class LeftOut:
    """A tensor of an input that nothing of the output is made of, and why."""

    input: int
    name: str
    reason: str


@dataclass(frozen=True)
class Companions:
    """Files of one kind that lie beside the weights, which the output takes from another folder than the template's.

    kind     what they are together: tokenizer, chat template, processor, generation config
    folder   where they lie
    files    their names in it
    dropped  those of the template's files that stay behind, for they belong to what these stand for
    why      in words
    """

    kind: str
    folder: str
    files: tuple[str, ...]
    dropped: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Plan(Table):
    """What `merge` will do, tensor by tensor.

    recipe     the recipe, as plain data
    inputs     every checkpoint that is read; `template`, `models` and `base` are places in it
    places     each model's place in the recipe's list, which random draws are keyed by
    settings   the distinct methods with their parameters; pieces point into it
    steps      one per tensor of the template, in its order; of adapters one per module that any of them has, then one
               per full weight, under the name that it is stored by
    left_out   every tensor of an input that is not read for any step
    warnings   what a person should know although nothing forbids it
    beside     whose files the output has beside its weights: see `planning.companions.files_beside`
    companions what lies beside the weights and is not the template's own, but its adapter's
    unties     whether the template's config ties its head to its embedding, and that of the output must not
    layout     how the output lies on disk
    config     of an adapter, the output's adapter_config.json
    """

    recipe: Mapping[str, Any]
    inputs: tuple[Input, ...]
    template: int
    models: tuple[int, ...]
    places: tuple[int, ...]
    base: int | None
    seed: int
    settings: tuple[Setting, ...]
    steps: tuple[Step, ...]
    left_out: tuple[LeftOut, ...] = ()
    warnings: tuple[str, ...] = ()
    beside: Mapping[str, str | None] = field(default_factory=dict)
    companions: tuple[Companions, ...] = ()
    unties: bool = False
    layout: Layout = "checkpoint"
    config: Mapping[str, Any] | None = None
    version: int = field(default=FORMAT)

    @property
    def size(self) -> int:
        """Bytes of all output tensors."""
        return sum(step.size for step in self.steps)

    @property
    def hash(self) -> str:
        """sha256 of what the merge computes: the same on any machine and for any place where the inputs lie."""
        data = self.to_json()
        del data["recipe"], data["warnings"], data["beside"], data["companions"], data["layout"]
        if self.config is None:
            del data["config"]
        for entry in data["inputs"]:
            for place in ("label", "source", "path", "adapter", "files", "wrappers", "kind"):
                del entry[place]
        for left_out in data["left_out"]:
            del left_out["reason"]
        for step in data["steps"]:
            del step["reason"]
            if step["lora"] is None:
                del step["lora"]
        return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def changes(self) -> bool:
        """Whether any tensor of the output is another one than the template's."""
        return any(step.fate in ("merged", "folded") for step in self.steps)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each tensor of the output: its fate, the methods that merge it, or why it is not merged."""
        return [
            {
                "tensor": step.name,
                "canonical": step.canonical,
                "fate": step.fate,
                "method": ", ".join(
                    dict.fromkeys(self.settings[one.setting].method for one in step.pieces if one.setting is not None)
                ),
                "dtype": step.dtype,
                "shape": step.shape,
                "reason": step.reason,
            }
            for step in self.steps
        ]

    def counts(self) -> dict[str, int]:
        """How many output tensors have each fate."""
        return {fate: sum(step.fate == fate for step in self.steps) for fate in FATES}

    @property
    def overwrites(self) -> tuple[Any, ...]:
        """Rows whose numbers a live model replaces after the merge: none, but see `inference.live`."""
        return ()

    @property
    def of_adapters(self) -> bool:
        """Whether it merges adapters into an adapter."""
        return self.layout != "checkpoint"

    def merged_pieces(self) -> Iterator[tuple[Step, Piece, Setting]]:
        """Every piece that is merged, with its step and its setting, in the output's order."""
        for step in self.steps:
            for piece in step.pieces:
                if piece.setting is not None:
                    yield step, piece, self.settings[piece.setting]

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON data; `make_plan` gives an equal plan back."""
        return {one.name: _plain(getattr(self, one.name)) for one in fields(Plan)}


def _transposed(expr: Expr | None) -> bool:
    match expr:
        case Stacked(_, transposed):
            return transposed
        case Concat(of):
            return any(map(_transposed, of))
        case Rows(of) | Adapted(of):
            return _transposed(of)
        case _:
            return False


def _plain(value: Any) -> Any:
    """A part of a plan as JSON data; what plays no part where plans are compared is no part of it."""
    if isinstance(value, Expr):
        return expr_to_json(value)
    if is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value) if one.compare}
    if isinstance(value, Mapping):
        return {name: _plain(held) for name, held in value.items()}
    return [_plain(held) for held in value] if isinstance(value, list | tuple) else value
