"""A plan: every tensor's fate, as plain data that can be printed, stored, compared and run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from polymerge.dtypes import byte_count
from polymerge.errors import RecipeError
from polymerge.families.expressions import (
    Adapted,
    Concat,
    Expr,
    Ranges,
    Read,
    Rows,
    Stacked,
    expr_from_json,
    expr_to_json,
    rows_of,
    shape_of,
)
from polymerge.recipe.parameters import Setting

__all__ = ["FATES", "IGNORED", "Companions", "Fate", "Input", "LeftOut", "Piece", "Plan", "Step"]

Fate = Literal["merged", "folded", "copied", "tied"]
FATES: Final[tuple[Fate, ...]] = get_args(Fate)

FORMAT = 5


@dataclass(frozen=True)
class Input:
    """One checkpoint that the merge reads.

    label        its short name in messages
    source, path as the recipe has it, and the folder or file it was found in
    adapter      the folder of the adapter that stands with it, if one does
    family       name of the family its tensor names were read with
    tensors, size  how many tensors it holds, and their bytes
    headers      sha256 over the names, dtypes, shapes and order of its tensors
    files        of an adapter, what became of each weight file in its folder
    wrappers     what is taken off their names as stored (see `checkpoint.wrapped`); all other names here are without
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

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Input:
        """The input of a plan that was written as JSON."""
        return cls(**{**data, "wrappers": tuple(data.get("wrappers", ()))})


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
class Step:
    """One tensor of the output, under the template's name, and what becomes of it.

    name    the template's own; or, where its adapter parts a head from the embedding that it was tied to, the name that
            the template's layout has for the one that it does not store
    fate    merged (at least one piece is), folded (the template's, changed by its adapter), copied byte for byte, or
            tied (the same storage as tensor `same_as`)
    dtype   of the output; `source_dtype` is the template's, which a copied tensor keeps
    reason  why it is not merged, or what a merged tensor's copied rows are
    view    how pieces see it, where that is not as it lies
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
        return 0 if self.fate == "tied" else byte_count(self.dtype, self.shape)


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
class Plan:
    """What `merge` will do, tensor by tensor.

    recipe     the recipe, as plain data
    inputs     every checkpoint that is read; `template`, `models` and `base` are places in it
    places     each model's place in the recipe's list, which random draws are keyed by
    settings   the distinct methods with their parameters; pieces point into it
    steps      one per tensor of the template, in its order
    left_out   every tensor of an input that is not read for any step
    warnings   what a person should know although nothing forbids it
    beside     whose files the output has beside its weights: see `planning.inputs.files_beside`
    companions what lies beside the weights and is not the template's own, but its adapter's
    unties     whether the template's config ties its head to its embedding, and that of the output must not
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
    version: int = field(default=FORMAT)

    @property
    def size(self) -> int:
        """Bytes of all output tensors."""
        return sum(step.size for step in self.steps)

    @property
    def hash(self) -> str:
        """sha256 of what the merge computes: the same on any machine and for any place where the inputs lie."""
        data = self.to_json()
        del data["recipe"], data["warnings"], data["beside"], data["companions"]
        for entry in data["inputs"]:
            for place in ("label", "source", "path", "adapter", "files", "wrappers"):
                del entry[place]
        for left_out in data["left_out"]:
            del left_out["reason"]
        for step in data["steps"]:
            del step["reason"]
        return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def counts(self) -> dict[str, int]:
        """How many output tensors have each fate."""
        return {fate: sum(step.fate == fate for step in self.steps) for fate in FATES}

    def merged_pieces(self) -> Iterator[tuple[Step, Piece, Setting]]:
        """Every piece that is merged, with its step and its setting, in the output's order."""
        for step in self.steps:
            for piece in step.pieces:
                if piece.setting is not None:
                    yield step, piece, self.settings[piece.setting]

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON data; `from_json` gives an equal plan back."""
        return {
            "version": self.version,
            "recipe": dict(self.recipe),
            "inputs": [{**vars(entry), "files": dict(entry.files)} for entry in self.inputs],
            "template": self.template,
            "models": list(self.models),
            "places": list(self.places),
            "base": self.base,
            "seed": self.seed,
            "settings": [
                {"method": setting.method, "parameters": _plain(setting.parameters)} for setting in self.settings
            ],
            "steps": [_step_to_json(step) for step in self.steps],
            "left_out": [vars(entry).copy() for entry in self.left_out],
            "warnings": list(self.warnings),
            "beside": dict(self.beside),
            "companions": [
                {**vars(one), "files": list(one.files), "dropped": list(one.dropped)} for one in self.companions
            ],
            "unties": self.unties,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` wrote; raises RecipeError for a plan of another version."""
        if data.get("version") != FORMAT:
            raise RecipeError(f"this plan has format {data.get('version')}, this polymerge reads {FORMAT}: plan again")
        return cls(
            recipe=data["recipe"],
            inputs=tuple(Input.from_json(entry) for entry in data["inputs"]),
            template=data["template"],
            models=tuple(data["models"]),
            places=tuple(data["places"]),
            base=data["base"],
            seed=data["seed"],
            settings=tuple(
                Setting(entry["method"], {name: _tuple(value) for name, value in entry["parameters"].items()})
                for entry in data["settings"]
            ),
            steps=tuple(_step_from_json(entry) for entry in data["steps"]),
            left_out=tuple(LeftOut(**entry) for entry in data["left_out"]),
            warnings=tuple(data["warnings"]),
            beside=data["beside"],
            companions=tuple(
                Companions(**{**one, "files": tuple(one["files"]), "dropped": tuple(one["dropped"])})
                for one in data.get("companions", ())
            ),
            unties=data["unties"],
            version=data["version"],
        )


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


def _step_to_json(step: Step) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": step.name,
        "canonical": step.canonical,
        "fate": step.fate,
        "dtype": step.dtype,
        "source_dtype": step.source_dtype,
        "shape": list(step.shape),
        "reason": step.reason,
        "same_as": step.same_as,
        "view": None if step.view is None else expr_to_json(step.view),
    }
    data["pieces"] = [
        {
            "canonical": piece.canonical,
            "rows": [list(block) for block in piece.rows],
            "setting": piece.setting,
            "reads": [expr_to_json(expr) for expr in piece.reads],
            "base": None if piece.base is None else expr_to_json(piece.base),
            "inputs": list(piece.inputs),
            "twin": piece.twin,
        }
        for piece in step.pieces
    ]
    return data


def _step_from_json(data: Mapping[str, Any]) -> Step:
    pieces = tuple(
        Piece(
            canonical=entry["canonical"],
            rows=tuple((start, stop) for start, stop in entry["rows"]),
            setting=entry["setting"],
            reads=tuple(expr_from_json(expr) for expr in entry["reads"]),
            base=None if entry["base"] is None else expr_from_json(entry["base"]),
            inputs=tuple(entry["inputs"]),
            twin=entry["twin"],
        )
        for entry in data["pieces"]
    )
    view = None if data["view"] is None else expr_from_json(data["view"])
    if view is not None and not isinstance(view, Stacked):
        raise RecipeError(f"not a plan: {data['name']} has the view {data['view']!r}, which is none. Plan again")
    return Step(**{**data, "shape": tuple(data["shape"]), "pieces": pieces, "view": view})


def _plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in parameters.items()}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
