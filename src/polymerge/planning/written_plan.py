"""Read a plan that was written as JSON: what `merge PLAN.json` carries out, on any machine.

Its members have the types of `plan`'s dataclasses, its indices and rows lead somewhere, and its settings are those that
a recipe can have. What it reads of its inputs is compared with them when they are opened (`engine.opening`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar, get_type_hints

import msgspec

from polymerge.checkpoints.adapter_config import read_lora_config
from polymerge.checkpoints.bounds import RECORDS_BYTES, read_bounded
from polymerge.checkpoints.discovery import CONFIG, is_plain
from polymerge.checkpoints.json_objects import checked, parse_json
from polymerge.dtypes import BITS, FP8, MERGEABLE
from polymerge.errors import PolymergeError, RecipeError, Refused, collecting, refuse
from polymerge.families.expressions import Expr, LowRank, Scaled, Stacked, expr_from_json
from polymerge.methods.own import check_methods
from polymerge.methods.table import MODIFIERS
from polymerge.planning.matrix_costs import is_matrix
from polymerge.planning.plan import FORMAT, Companions, Input, LeftOut, Lora, Piece, Plan, Step
from polymerge.recipe.parameters import Setting, written_setting
from polymerge.recipe.parsing import parse_recipe

__all__ = ["written_plan"]

T = TypeVar("T")

_AGAIN: Final = "Plan again"
_MOST_RANKS: Final = 1 << 20


def written_plan(source: str | os.PathLike[str] | Mapping[str, Any]) -> Plan | None:
    """The plan in a JSON file or a mapping, as written by `Plan.to_json`; None if it is a recipe instead.

    raises RecipeError for a plan of another version, and for one that was modified; Refused for several problems.
    """
    if isinstance(source, Mapping):
        data, where = source, "this plan"
    else:
        where = str(source)
        try:
            text = read_bounded(Path(source), RECORDS_BYTES) if where.endswith(".json") else b"{}"
            data = parse_json(text, where, dict[str, Any])
        except (OSError, PolymergeError):
            return None  # which is said of it as a recipe
    if not {"version", "inputs", "steps"} <= data.keys():
        return None
    if data["version"] != FORMAT:
        raise RecipeError(f"{where} has format {data['version']}, this polymerge reads {FORMAT}: plan again")
    stages = data.get("stages")
    for one in (data, *(stages if isinstance(stages, list) else ())):
        own = one.get("methods", {}) if isinstance(one, Mapping) else {}
        check_methods(checked(own, dict[str, str], f"{where}: methods", error=RecipeError, then=_AGAIN), where)
    try:
        with collecting(needed=True):
            plan = _plan({name: value for name, value in data.items() if name != "hash"})
    except PolymergeError as error:
        wrong = [RecipeError(f"{where} is not a valid plan: {problem}") for problem in error.problems]
        raise (wrong[0] if len(wrong) == 1 else Refused(wrong)) from None
    if data.get("hash", plan.hash) != plan.hash:
        raise RecipeError(f"{where} was modified: its hash is {plan.hash}, the recorded one is {data['hash']}")
    return plan


def _plan(data: Mapping[str, Any]) -> Plan:
    lists = {name: data.get(name) for name in ("inputs", "settings", "steps", "left_out", "companions", "stages")}
    entries = checked(lists, dict[str, list[dict[str, Any]]], "plan", error=RecipeError, then=_AGAIN)
    recipe = data.get("recipe")
    on_base = isinstance(recipe, Mapping) and recipe.get("base_model") is not None
    settings = [(f"settings[{place}]", one) for place, one in enumerate(entries["settings"])]
    made = {
        "inputs": tuple(_made(Input, one, f"inputs[{place}]") for place, one in enumerate(entries["inputs"])),
        "settings": tuple(_setting(one, where, on_base) for where, one in settings),
        "steps": tuple(_step(one, f"steps[{place}]") for place, one in enumerate(entries["steps"])),
        "left_out": tuple(_made(LeftOut, one, "left_out") for one in entries["left_out"]),
        "companions": tuple(_made(Companions, one, "companions") for one in entries["companions"]),
        "stages": tuple(map(_plan, entries["stages"])),
    }
    plan = _made(Plan, {"methods": {}, **data}, "plan", **made)
    parse_recipe(plan.recipe)
    if plan.config is not None:
        read_lora_config(plan.config, f"its {CONFIG}")
    refuse(*(RecipeError(f"{fault}. {_AGAIN}") for fault in dict.fromkeys(_faults(plan))))
    return plan


def _setting(data: Mapping[str, Any], where: str, on_base: bool) -> Setting:
    said = _made(Setting, data, where)
    return replace(written_setting(said.method, said.parameters, where), on_base=on_base, schedule=said.schedule)


def _step(data: Mapping[str, Any], where: str) -> Step:
    held = checked(data.get("pieces"), list[dict[str, Any]], f"{where}.pieces", error=RecipeError, then=_AGAIN)
    pieces = tuple(_piece(one, f"{where}.pieces[{place}]") for place, one in enumerate(held))
    view = None if data.get("view") is None else expr_from_json(data["view"])
    if view is not None and not isinstance(view, Stacked | Scaled):
        raise RecipeError(f"{where} has the view {data['view']!r}, which is not a view. {_AGAIN}")
    lora = None if data.get("lora") is None else _made(Lora, data["lora"], f"{where}.lora")
    return _made(Step, data, where, pieces=pieces, view=view, lora=lora)


def _piece(data: Mapping[str, Any], where: str) -> Piece:
    reads = checked(data.get("reads"), list[Any], f"{where}.reads", error=RecipeError, then=_AGAIN)
    base = None if data.get("base") is None else expr_from_json(data["base"])
    return _made(Piece, data, where, reads=tuple(map(expr_from_json, reads)), base=base)


def _made(kind: type[T], data: Mapping[str, Any], where: str, **made: Any) -> T:
    """An object of a dataclass from JSON data, every member of which is there and of its type.

    made  members that are converted already
    """
    form = _form(kind, tuple(made))  # type: ignore[arg-type]  # every type is hashable
    found = checked(data, form, where, error=RecipeError, then=_AGAIN)
    return kind(**msgspec.structs.asdict(found) | made)


@cache
def _form(kind: type[Any], made: tuple[str, ...]) -> type[msgspec.Struct]:
    """The members of a dataclass as a type that JSON data is checked against; any value for those in `made`."""
    hints = get_type_hints(kind)
    members = [(one.name, Any if one.name in made else hints[one.name]) for one in fields(kind) if one.compare]
    return msgspec.defstruct(kind.__name__, members, forbid_unknown_fields=True)


def _faults(plan: Plan) -> Iterator[str]:
    """What cannot be of a plan, although its members have the right types."""
    inputs = range(len(plan.inputs))
    places = [plan.template, *plan.models, *([] if plan.base is None else [plan.base])]
    places += [one.input for one in plan.left_out]
    if not plan.models or len(plan.places) != len(plan.models) or not all(place in inputs for place in places):
        yield "it has other inputs than its template, models and base say"
        return
    names_of_stages = [stage.name for stage in plan.stages]
    if not all(names_of_stages) or len(set(names_of_stages)) < len(names_of_stages):
        yield "its stages have names of their own"
    if any(stage.stages or stage.of_adapters for stage in plan.stages):
        yield "its stages are merges of checkpoints"
    if min(plan.seed, *plan.places) < 0:
        yield "its seed and places are counted from 0"
    if plan.beside and not {"config", "tokenizer", "chat_template", "why"} <= plan.beside.keys():
        yield "it does not say where config, tokenizer and chat template come from"
    for one in plan.companions:
        if outside := [name for name in (*one.files, *one.dropped) if not is_plain(name)]:
            yield f"a plan cannot name files outside of its folders: '{outside[0]}'"
        if one.folder not in {name for held in plan.inputs for name in (held.path or held.source, held.adapter)}:
            yield f"a plan cannot take files from '{one.folder}', which is none of its inputs"
    if plan.vocabulary is not None and not {*plan.vocabulary.ids} <= {"config.json", "generation_config.json"}:
        yield "its vocabulary names other files than configs"
    if plan.of_adapters != (plan.config is not None):
        yield "only a plan of adapters has a config"
    names = Counter(step.name for step in plan.steps)
    stored = Counter(name for step in plan.steps if _has_sizes(step) for name in step.stored)
    if twice := [name for name, count in (names | stored).items() if count > 1]:
        yield f"it writes '{twice[0]}' twice"
    for step in plan.steps:
        yield from (f"step '{step.name}': {fault}" for fault in _faults_of(plan, step, names))


def _has_sizes(step: Step) -> bool:
    """Whether a step's dtypes and sizes are such that what it stores can be told."""
    sizes = step.shape if step.lora is None else (*step.shape, step.lora.rank)
    dtypes = (step.dtype, step.source_dtype, *(step.lora.dtypes if step.lora else ()))
    known = all(size >= 0 for size in sizes) and all(dtype in BITS for dtype in dtypes)
    return known and (step.lora is None or len(step.shape) == 2)


def _faults_of(plan: Plan, step: Step, names: Mapping[str, int]) -> Iterator[str]:
    if not _has_sizes(step):
        yield f"{step.dtype} {list(step.shape)} is no dtype and shape"
        return
    if step.lora is not None:
        sound = plan.of_adapters and len(step.shape) == 2 and 0 < step.lora.rank <= _MOST_RANKS
        if not (sound and step.view is None and len(step.pieces) == 1 and step.lora.scaling == step.lora.scaling):
            yield "is no module of an adapter"
            return
    of = step.view.of.name if isinstance(step.view, Scaled) else step.view.name if step.view else step.name
    if of != step.name or (isinstance(step.view, Stacked) and len(step.shape) != 3):
        yield "its view is of another tensor"
        return
    merges = any(piece.setting is not None for piece in step.pieces)
    if (merges != (step.fate == "merged")) or (step.fate in ("copied", "tied") and not _copies(step)):
        yield f"is not {step.fate} by these pieces"
    if step.fate == "tied" and (step.same_as not in names or step.same_as == step.name):
        yield f"is tied to '{step.same_as}', which is not there"
    computed = merges or step.fate == "dequantized"
    if computed and (step.dtype not in MERGEABLE or step.source_dtype not in (*MERGEABLE, *FP8)):
        yield f"cannot be merged as {step.dtype}"
    for piece in step.pieces:
        yield from _faults_in(plan, step, piece)
    rows = sorted(block for piece in step.pieces for block in piece.rows)
    ends = [0, *(stop for _, stop in rows)]
    if step.pieces and ([start for start, _ in rows] != ends[:-1] or ends[-1] != _rows(step)):
        yield f"its pieces are not its {_rows(step)} rows, each once"


def _copies(step: Step) -> bool:
    """Whether a step that merges nothing keeps the template's bytes, or its numbers in another dtype."""
    converted = all(not piece.reads or step.dtype in MERGEABLE for piece in step.pieces)
    return converted and (bool(step.pieces) or step.dtype == step.source_dtype)


def _rows(step: Step) -> int:
    """The number of rows that pieces refer to; a tensor without dimensions has one."""
    if isinstance(step.view, Stacked):
        return step.shape[0] * step.shape[2 if step.view.transposed else 1]
    return step.shape[0] if step.shape else 1


def _faults_in(plan: Plan, step: Step, piece: Piece) -> Iterator[str]:
    places = piece.inputs or (plan.models if piece.setting is not None else (plan.template,))
    if not all(place in range(len(plan.inputs)) for place in places):
        yield f"there are no inputs {list(places)}"
        return
    if any(not 0 <= start <= stop for start, stop in piece.rows):
        yield f"there are no rows {[list(block) for block in piece.rows]}"
    exprs: list[Expr] = [*piece.reads, *([] if piece.base is None else [piece.base])]
    if any(isinstance(expr, LowRank) != (step.lora is not None) for expr in exprs):
        yield "factors are read for modules, and for nothing else"
    if piece.setting is None:
        if piece.base is not None or len(piece.reads) > 1 or (step.lora is not None and not piece.reads):
            yield "what is not merged is read from one input"
        return
    if piece.setting not in range(len(plan.settings)):
        yield f"there is no setting {piece.setting}"
        return
    setting = plan.settings[piece.setting]
    counts = {len(value) for value in setting.parameters.values() if isinstance(value, tuple)}
    if len(piece.reads) != len(places) or not counts <= {len(places)} or not {*piece.inputs} <= {*plan.models}:
        yield f"it reads {len(piece.reads)} tensors for {setting.method} of {len(places)} models"
    if setting.row.models not in (None, len(places)):
        yield f"{setting.method} takes {setting.row.models} models"
    if step.lora is None:
        more = setting.parameters.keys() - {one.name for one in setting.row.parameters}
        if setting.row.on == "factors" or not more <= {one.name for one in MODIFIERS}:
            yield f"{setting.method} with these parameters is for adapters"
        if setting.whole and not is_matrix(piece.canonical, step.shape_of(piece)):
            yield f"{setting.method} is for matrices"
        has_base = piece.base is not None
        unfit = setting.on_deltas != has_base and not plan.of_adapters
        if unfit or (has_base and plan.base is None):
            yield f"{setting.method} and a base do not fit"
    elif not setting.row.takes_adapters or "rank" not in setting.parameters:
        yield f"{setting.method} with these parameters is for checkpoints"
