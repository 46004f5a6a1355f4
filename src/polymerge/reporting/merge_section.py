"""The page's merge section: recipe, inputs with their digests, outcome, and the plan as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from msgspec import Struct, field

from polymerge.charts import Series, bar_chart, figure
from polymerge.checkpoints.json_objects import checked
from polymerge.engine.provenance import PLAN_VERSION
from polymerge.errors import PolymergeError, RecipeError, refuse
from polymerge.planning.text_words import setting_words
from polymerge.recipe.parameters import Setting
from polymerge.reporting.records import AGAIN, Count, Number, Source

__all__ = ["merge_section"]

_MOST_ERRORS = 40


class Input(Struct, kw_only=True):
    """A checkpoint that was merged."""

    label: str
    role: list[str]
    family: str
    source: str
    pinned: str = ""
    sampled: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, str]


class Output(Struct):
    """The output: tensors of a checkpoint, or modules of an adapter with ranks and relative errors."""

    files: dict[str, Number]
    tensors: dict[str, Number] = field(default_factory=dict)
    modules: dict[str, Number] | None = None
    parameters: Count | None = None
    ranks: list[Number] = field(default_factory=list)
    relative_error: dict[str, Number] | None = None


class Recipe(Struct):
    """The only field of a recipe that is read; the page shows the recipe unchanged."""

    merge_method: str


class Record(Struct, kw_only=True):
    """The members of polymerge.json that the page shows."""

    polymerge: str
    created: str
    command: list[str]
    recipe: Recipe
    plan_hash: str
    seed: Number
    inputs: list[Input]
    output: Output
    versions: dict[str, Any]
    plan: dict[str, Any] | None = None


class PlanSetting(Struct):
    """A method with its parameters, and the models that list-valued parameters refer to."""

    method: str
    parameters: dict[str, Any]
    models: list[str]


class Columns(Struct):
    """The column names of each table of a plan."""

    left_out: list[str]
    steps: list[str] = field(default_factory=list)
    pairs: list[str] = field(default_factory=list)


class PlanTable(Struct, kw_only=True):
    """A plan as `polymerge.engine.provenance` writes it."""

    settings: list[PlanSetting]
    columns: Columns
    pairs: list[list[Any]] = field(default_factory=list)
    steps: list[list[Any]] = field(default_factory=list)
    left_out: list[list[Any]]
    warnings: list[str]


class Step(Struct, kw_only=True):
    """The fate of a tensor, or of an adapter's module, which has a rank."""

    name: str
    canonical: str
    fate: str
    dtype: str
    shape: list[int]
    setting: int | list[int] | None = None
    reason: str
    rank: Count | None = None
    scaling: Number = 1
    adapters: list[str] = field(default_factory=list)


class LeftOut(Struct):
    """An unused tensor of an input."""

    input: str
    name: str
    reason: str


def merge_section(source: Source) -> dict[str, Any]:
    """The page's section on a merge.

    raises RecipeError, or Refused for several problems.
    """
    record = source.read(Record)
    output = record.output
    counts = output.tensors if output.modules is None else output.modules
    section: dict[str, Any] = {
        "label": source.label,
        "file": str(source.file),
        "polymerge": record.polymerge,
        "created": record.created,
        "command": " ".join(record.command),
        "method": record.recipe.merge_method,
        "recipe": yaml.safe_dump(dict(source.data["recipe"]), sort_keys=False, allow_unicode=True),
        "plan_hash": record.plan_hash,
        "seed": record.seed,
        "inputs": [_input(entry) for entry in record.inputs],
        "files": [{"name": name, "bytes": size} for name, size in output.files.items()],
        "bytes": sum(output.files.values()),
        "counted": "tensors" if output.modules is None else "modules",
        "counts": counts,
        "total": sum(counts.values()),
        "parameters": output.parameters,
        "versions": record.versions,
        "plan": None if record.plan is None else _plan(record.plan, f"{source.file}: plan"),
        "charts": [],
    }
    if output.relative_error is not None:
        errors = sorted(output.relative_error.items(), key=lambda item: -item[1])
        section["ranks"] = output.ranks
        section["relative_error"] = {"modules": len(errors), "most": errors[0][1] if errors else None}
        if errors and errors[0][1] > 0:
            section["charts"].append(_cut_off(errors[:_MOST_ERRORS]))
    return section


def _cut_off(errors: Sequence[tuple[str, Number]]) -> dict[str, Any]:
    chart = bar_chart(
        "What the rank has no room for", ("module", [name for name, _ in errors]), "relative error",
        {"relative error": Series([error for _, error in errors])},
        about="share of the norm of a merged update that is cut off at the output's rank, largest first",
    )  # fmt: skip
    return figure({"": chart})


def _input(entry: Input) -> dict[str, Any]:
    return {
        "label": entry.label,
        "roles": entry.role,
        "family": entry.family,
        "source": entry.source,
        "pinned": entry.pinned,
        "files": [
            {"name": name, "sha256": entry.sha256.get(name, ""), "sampled": entry.sampled.get(name, "")}
            for name in dict.fromkeys([*entry.sampled, *entry.sha256])
        ],
    }


def _plan(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The plan as rows that refer to settings and reasons by index."""
    version = data.get("version")
    if version != PLAN_VERSION:
        said = f"{where} has version {version}, this polymerge reads {PLAN_VERSION}. Use the one that merged"
        raise RecipeError(said)
    table = checked(data, PlanTable, where, error=RecipeError, then=AGAIN)
    settings = [_setting(entry, f"{where}: settings[{place}]") for place, entry in enumerate(table.settings)]
    reasons: dict[str, int] = {}
    rows = []
    for name, found, columns in (
        ("pairs", table.pairs, table.columns.pairs),
        ("steps", table.steps, table.columns.steps),
    ):
        for at, step in _rows(found, columns, Step, f"{where}: {name}"):
            rows.append(_row(step, len(settings), reasons, at))
    left_out = [
        [one.input, one.name, reasons.setdefault(one.reason, len(reasons))]
        for _, one in _rows(table.left_out, table.columns.left_out, LeftOut, f"{where}: left_out")
    ]
    uses = Counter(place for row in rows for place in row[5])
    return {
        "settings": [{**setting, "rows": uses[place]} for place, setting in enumerate(settings)],
        "columns": ["name", "canonical", "fate", "dtype", "shape", "settings", "reason", "rows"],
        "rows": rows,
        "shown": len(rows),
        "by_kind": False,
        "left_out": left_out,
        "left_out_by_reason": _by_reason(left_out, list(reasons)),
        "reasons": list(reasons),
        "warnings": table.warnings,
    }


def _rows(rows: Sequence[Sequence[Any]], columns: Sequence[str], type: Any, where: str) -> Iterator[tuple[str, Any]]:  # noqa: A002
    """Each row of a table as a struct, with its location in the file; invalid rows are refused."""
    for place, row in enumerate(rows):
        at = f"{where}[{place}]"
        if len(row) != len(columns):
            refuse(RecipeError(f"{at} has {len(row)} cells for {len(columns)} columns. {AGAIN}"))
            return
        try:
            yield at, checked(dict(zip(columns, row, strict=True)), type, at, error=RecipeError, then=AGAIN)
        except PolymergeError as error:
            refuse(error)


def _row(step: Step, settings: int, reasons: dict[str, int], at: str) -> list[Any]:
    places = [] if step.setting is None else step.setting if isinstance(step.setting, list) else [step.setting]
    for place in places:
        if not 0 <= place < settings:
            refuse(RecipeError(f"{at}: setting {place} is none of the plan's {settings}. {AGAIN}"))
    reason = step.reason
    if step.rank is not None:
        made = f"rank {step.rank} x {step.scaling:g} from {', '.join(step.adapters)}"
        reason = f"{made}; {reason}" if reason else made
    return [
        step.name, step.canonical, step.fate, step.dtype, step.shape, places,
        reasons.setdefault(reason, len(reasons)), 1,
    ]  # fmt: skip


def _setting(entry: PlanSetting, where: str) -> dict[str, Any]:
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in entry.parameters.items()}
    words = entry.method
    try:
        words = setting_words(Setting(entry.method, given), entry.models)
    except (TypeError, ValueError):
        refuse(RecipeError(f"{where}: parameters do not fit the models {', '.join(entry.models)}. {AGAIN}"))
    return {"method": entry.method, "parameters": entry.parameters, "models": entry.models, "words": words}


def _by_reason(left_out: Sequence[Sequence[Any]], reasons: Sequence[str]) -> list[Mapping[str, Any]]:
    counts = Counter((label, reason) for label, _, reason in left_out)
    return [{"input": label, "reason": reasons[reason], "tensors": count} for (label, reason), count in counts.items()]
