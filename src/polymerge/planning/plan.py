"""A plan: every tensor's fate, as plain data that can be printed, stored, compared and run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Final, Literal, TypeAlias, get_args

from polymerge.checkpoints import Checkpoint
from polymerge.checkpoints.tokenizer import AddedToken
from polymerge.dtypes import byte_count
from polymerge.families.expressions import (
    Adapted,
    Concat,
    Expr,
    Mean,
    Ranges,
    Read,
    Rows,
    Scaled,
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
__all__ += ["Step", "Vocabulary"]

Fate = Literal["merged", "folded", "dequantized", "copied", "tied"]
FATES: Final[tuple[Fate, ...]] = get_args(Fate)

Layout: TypeAlias = Literal["checkpoint", "peft", "llava"]
"""The layout of an output: a transformers checkpoint, or an adapter in PEFT's or in LLaVA's files."""

PREFIX: Final = "base_model.model."
"""Prefix of every parameter name in PEFT's files."""

FORMAT = 7


@dataclass(frozen=True)
class Input:
    """One checkpoint or adapter that the merge reads.

    label        its short name in messages
    source, path as in the recipe, and the folder or file that it was found in
    adapter      the folder of its adapter, if it has one
    family       the family whose table its tensor names were read with
    tensors, size  the number of its tensors, and their bytes
    headers      sha256 over the names, dtypes, shapes and order of its tensors
    settings     sha256 over its config.json and that of its adapter, as values
    beside       the sha256 of each file of text beside its weights, by name; after a +, of one in its adapter's folder
    files        for an adapter, what each weight file in its folder was used for
    wrappers     prefixes stripped from the names as stored (see `checkpoints.names`); all other names here lack them
    renamed      name as stored, without wrappers -> its name here, of those that are read under another
    kind         a checkpoint, with or without an adapter, or an adapter alone
    layers       the number of layers of a checkpoint's text tower; unknown in a plan that was written
    opened       the headers that the plan was made from, in the process that made it; also for an adapter alone
    """

    label: str
    source: str
    path: str
    family: str
    tensors: int
    size: int
    headers: str
    settings: str
    beside: Mapping[str, str] = field(default_factory=dict, hash=False)
    adapter: str = ""
    files: Mapping[str, str] = field(default_factory=dict, hash=False)
    wrappers: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict, hash=False)
    kind: Literal["checkpoint", "adapter"] = "checkpoint"
    layers: int | None = field(default=None, compare=False, repr=False)
    opened: Checkpoint | None = field(default=None, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "opened": None}  # another process opens it for itself


@dataclass(frozen=True)
class Piece:
    """Rows of an output tensor with one origin: merged by one setting, or copied.

    canonical  the name that joins the models' tensors; random draws are keyed by it
    rows       blocks of rows of the output tensor, stacked in this order; ((0, 1),) for a tensor without dimensions.
               If its step has a view, they are rows of the view
    setting    the index of the plan's setting that merges it; None if the rows are the template's
    reads      the expression for each model's rows, in the models' order; without a setting, what replaces the
               template's own bytes, or, without inputs, where those are if not in a tensor of that name
    inputs     the inputs that `reads` refer to, if not every model in order
    base       the expression for the base's rows, for methods on deltas
    twin       the canonical tensor that this one may duplicate: the embedding, for a head that is stored beside it
               although the config ties the two. Random draws are keyed by that name, so duplicates stay equal, and
               equal values are counted once
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
    """The factors of an adapter's module as the output stores them: a [rank, in] and b [out, rank].

    scaling    the multiplier of b a, as in adapter_config.json
    dtypes     of a and b
    bias       whether b has a bias, [out]
    embedding  whether the module is an embedding, whose factors PEFT names differently
    experts    the number of matrices of a parameter whose factors these are, as in `LowRank`; 0 for a module
    wrapped    the name that its factors have in PEFT's files, as if of a module; that of the module if empty
    """

    rank: int
    scaling: float
    dtypes: tuple[str, str]
    bias: bool = False
    embedding: bool = False
    experts: int = 0
    wrapped: str = ""


@dataclass(frozen=True)
class Step:
    """One tensor of the output, under the template's name, and its fate.

    For an adapter, also one module, by its name in the base; its only piece reads factors (`LowRank`), and its shape is
    that of the update, [out, in].

    name    the template's own; or, if its adapter unties a head from its embedding, the name that
            the template's layout has for the tensor that is not stored
    fate    merged (at least one piece), folded (the template's, changed by its adapter), dequantized (the template's,
            which is stored in fp8), copied byte for byte, or tied (the same storage as tensor `same_as`)
    dtype   of the output; `source_dtype` is the template's, which a copied tensor keeps
    reason  why it is not merged, or which rows of a merged tensor are copied
    view    the view that pieces refer to, if it is not the tensor as stored
    lora    the factors of a module
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
    view: Stacked | Scaled | None = None
    lora: Lora | None = None

    @property
    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The dtype and shape of each tensor written for this step, by name; empty for a tied tensor."""
        if self.fate == "tied":
            return {}
        if self.lora is None:
            return {self.name: (self.dtype, self.shape)}
        (out, width), rank, (a, b) = self.shape, self.lora.rank * (self.lora.experts or 1), self.lora.dtypes
        ends = ("lora_embedding_A", "lora_embedding_B") if self.lora.embedding else ("lora_A.weight", "lora_B.weight")
        tensors = {ends[0]: (a, (rank, width)), ends[1]: (b, (out, rank))}
        bias = {"lora_B.bias": (b, (out,))} if self.lora.bias else {}
        return {f"{PREFIX}{self.lora.wrapped or self.name}.{end}": held for end, held in {**tensors, **bias}.items()}

    @property
    def transposed(self) -> bool:
        """Whether rows, as pieces see them, are columns of its matrices."""
        return isinstance(self.view, Stacked) and self.view.transposed

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        return shape_of(self.view or Read(self.name), {self.name: self.shape})[1:]

    def turns(self, piece: Piece) -> bool:
        """Return whether a piece's rows are columns in the file of an input or of the output."""
        return self.transposed or any(map(_transposed, (*piece.reads, piece.base)))

    def shape_of(self, piece: Piece) -> tuple[int, ...]:
        """The shape of a piece's rows."""
        return (sum(stop - start for start, stop in piece.rows), *self.row_shape)

    def rows(self, ranges: Ranges) -> Expr:
        """The expression for some of the template's rows."""
        return rows_of(self.view or Read(self.name), ranges)

    @property
    def size(self) -> int:
        """Its size in the output, in bytes."""
        return sum(byte_count(*held) for held in self.stored.values())


IGNORED: Final = "ignored by the recipe"
"""The reason for tensors left out by `ignore`."""


@dataclass(frozen=True)
class LeftOut:
    """A tensor of an input that is not used for the output, and why."""

    input: int
    name: str
    reason: str


@dataclass(frozen=True)
class Companions:
    """Files of one kind beside the weights that the output takes from a folder other than the template's.

    kind     tokenizer, chat template, processor or generation config
    folder   the folder that they are in
    files    their names
    dropped  the template's files that these replace
    why      the reason, as text
    """

    kind: str
    folder: str
    files: tuple[str, ...]
    dropped: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of an output whose recipe says `tokenizer_source`.

    source    as in the recipe
    tokenizer the label of the model whose tokenizer the output has
    agrees    whether all models have one vocabulary, so that nothing changes
    rows      of the output's embedding
    added     tokens that are added to that tokenizer
    lenders   how many of them each model has brought, by its label
    filled    for each model that lacks tokens, by its label, how many rows of the embedding it is lent, and whose
    ids       for files of the output's config, the keys for numbers of tokens that differ from the template's
    """

    source: str
    tokenizer: str
    agrees: bool
    rows: int
    added: tuple[AddedToken, ...]
    lenders: Mapping[str, int]
    filled: Mapping[str, Mapping[str, int]]
    ids: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Plan(Table):
    """What `merge` will do: the fate of every tensor.

    recipe     the recipe, as plain data
    inputs     every checkpoint that is read; `template`, `models` and `base` are indices into it
    places     each model's index in the recipe's list; random draws are keyed by it
    settings   the distinct methods with their parameters; pieces index it
    steps      one per tensor of the template, in its order; for adapters one per module that any of them has, then one
               per full weight, under the name that it is stored by
    left_out   every tensor of an input that no step reads
    warnings   notes that do not prevent the merge
    beside     the sources of the files beside the weights: see `planning.companions.files_beside`
    companions files beside the weights that come from the template's adapter
    vocabulary  the output's, if the recipe chooses it
    chat_template  the output's, if the recipe chooses it
    unties     whether the template's config ties head and embedding and the output's must not
    layout     the layout of the output on disk
    config     for an adapter, the output's adapter_config.json
    methods    the user's own methods that it merges with, each with what its code is known by
    stages     the plans of the merges before this one, in order; inputs of theirs and of this one that are such
               outputs have the stage's name as their source, and no path
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
    vocabulary: Vocabulary | None = None
    chat_template: str | None = None
    unties: bool = False
    layout: Layout = "checkpoint"
    config: Mapping[str, Any] | None = None
    methods: Mapping[str, str] = field(default_factory=dict)
    stages: tuple[Plan, ...] = ()
    version: int = field(default=FORMAT)

    @property
    def size(self) -> int:
        """The total size of all output tensors, in bytes."""
        return sum(step.size for step in self.steps)

    @property
    def hash(self) -> str:
        """sha256 of what the merge computes: the same on any machine and wherever the inputs are stored."""
        data = self.to_json()
        del data["recipe"], data["warnings"], data["beside"], data["companions"], data["layout"]
        del data["vocabulary"], data["chat_template"]
        if self.config is None:
            del data["config"]
        if not self.methods:
            del data["methods"]
        stages = data.pop("stages")
        if stages:
            data["stages"] = [stage.hash for stage in self.stages]
        for setting in data["settings"]:
            if not setting["schedule"]:
                del setting["schedule"]
        for entry in data["inputs"]:
            for place in (
                "label",
                "source",
                "path",
                "settings",
                "beside",
                "adapter",
                "files",
                "wrappers",
                "renamed",
                "kind",
            ):
                del entry[place]
        for left_out in data["left_out"]:
            del left_out["reason"]
        for step in data["steps"]:
            del step["reason"]
            if step["lora"] is None:
                del step["lora"]
            elif not step["lora"]["experts"]:
                del step["lora"]["experts"], step["lora"]["wrapped"]
        return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def name(self) -> str:
        """The name by which later stages name its output; empty for a merge by itself."""
        return str(self.recipe.get("name") or "")

    @property
    def changes(self) -> bool:
        """Whether any tensor of the output differs from the template's."""
        return any(step.fate in ("merged", "folded", "dequantized") for step in self.steps)

    @property
    def renames(self) -> bool:
        """Whether the output's tensors have other names, or are cut otherwise, than the template's."""
        return bool(self.inputs[self.template].renamed) or any(
            step.fate == "copied" and step.pieces for step in self.steps
        )

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
        """The number of output tensors per fate."""
        return {fate: sum(step.fate == fate for step in self.steps) for fate in FATES}

    @property
    def overwrites(self) -> tuple[Any, ...]:
        """Rows that a live model overwrites after the merge; always empty here, see `inference.live`."""
        return ()

    @property
    def of_adapters(self) -> bool:
        """Whether it merges adapters into an adapter."""
        return self.layout != "checkpoint"

    def merged_pieces(self) -> Iterator[tuple[Step, Piece, Setting]]:
        """Every merged piece with its step and its setting, in the output's order."""
        for step in self.steps:
            for piece in step.pieces:
                if piece.setting is not None:
                    yield step, piece, self.settings[piece.setting]

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON data, from which `make_plan` restores an equal plan."""
        return {one.name: _plain(getattr(self, one.name)) for one in fields(Plan)}


def _transposed(expr: Expr | None) -> bool:
    match expr:
        case Stacked(_, transposed):
            return transposed
        case Concat(of) | Mean(of):
            return any(map(_transposed, of))
        case Rows(of) | Adapted(of):
            return _transposed(of)
        case _:
            return False


def _plain(value: Any) -> Any:
    """Convert a part of a plan to JSON data; fields that do not take part in comparison are omitted."""
    if isinstance(value, Expr):
        return expr_to_json(value)
    if is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value) if one.compare}
    if isinstance(value, Mapping):
        return {name: _plain(held) for name, held in value.items()}
    return [_plain(held) for held in value] if isinstance(value, list | tuple) else value
