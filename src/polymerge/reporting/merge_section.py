"""A merge as the page shows it: recipe, inputs with their digests, outcome, and the plan as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from polymerge.engine.provenance import PLAN_VERSION
from polymerge.errors import PolymergeError, RecipeError
from polymerge.planning.text_words import setting_words
from polymerge.recipe.parameters import Setting
from polymerge.reporting.charts import bars
from polymerge.reporting.fields import Fields
from polymerge.reporting.records import Source

__all__ = ["merge_section"]

_MOST_ERRORS = 40


def merge_section(source: Source, problems: list[PolymergeError]) -> dict[str, Any]:
    """What polymerge.json says, in the page's form; what is wrong with it is noted in `problems`."""
    record = Fields(source.data, str(source.file), problems)
    recipe = record.object("recipe")
    output = record.object("output")
    sizes = _numbers(output.object("files"))
    fates = "modules" if "modules" in output.data else "tensors"
    section: dict[str, Any] = {
        "label": source.label,
        "file": str(source.file),
        "polymerge": record.text("polymerge"),
        "created": record.text("created"),
        "command": " ".join(record.texts("command")),
        "method": recipe.text("merge_method"),
        "recipe": yaml.safe_dump(dict(recipe.data), sort_keys=False, allow_unicode=True),
        "plan_hash": record.text("plan_hash"),
        "seed": record.number("seed"),
        "inputs": [_input(entry) for entry in record.objects("inputs")],
        "files": [{"name": name, "bytes": size} for name, size in sizes.items()],
        "bytes": sum(sizes.values()),
        "counted": fates,
        "counts": _numbers(output.object(fates)),
        "parameters": None if output.missing("parameters") else output.count("parameters"),
        "versions": dict(record.object("versions").data),
        "plan": None if record.missing("plan") else _plan(record.object("plan")),
        "charts": [],
    }
    section["total"] = sum(section["counts"].values())
    if not output.missing("relative_error"):
        errors = _numbers(output.object("relative_error"))
        section["ranks"] = output.numbers("ranks")
        section["relative_error"] = {"modules": len(errors), "most": max(errors.values(), default=None)}
        worst = sorted(errors.items(), key=lambda item: -item[1])[:_MOST_ERRORS]
        if worst and worst[0][1] > 0:
            section["charts"].append(
                bars(
                    "What the rank has no room for",
                    [name for name, _ in worst],
                    [{"name": "relative error", "values": [error for _, error in worst]}],
                    about="share of the norm of a merged update that is cut off at the output's rank, largest first",
                )
            )
    return section


def _input(entry: Fields) -> dict[str, Any]:
    digests = entry.object("sha256")
    return {
        "label": entry.text("label"),
        "roles": entry.texts("role"),
        "family": entry.text("family"),
        "source": entry.text("source"),
        "path": entry.text("path"),
        "adapter": "" if entry.missing("adapter") else entry.text("adapter"),
        "files": [{"name": name, "sha256": digests.text(name)} for name in digests.data],
    }


def _numbers(entry: Fields) -> dict[str, float]:
    return {name: entry.number(name) for name in entry.data}


def _plan(table: Fields) -> dict[str, Any] | None:
    """The plan with its reasons told once; rows point at them."""
    version = table.data.get("version")
    if version != PLAN_VERSION:
        said = f"{table.where} has version {version}, this polymerge reads {PLAN_VERSION}. Use the one that merged"
        table.problems.append(RecipeError(said))
        return None
    settings = [_setting(entry) for entry in table.objects("settings")]
    columns = table.object("columns")
    reasons: dict[str, int] = {}
    rows = []
    for name in ("pairs", "steps"):
        if name not in table.data:
            continue
        for row in table.rows(name, columns.texts(name)):
            rows.append(_row(row, len(settings), reasons))
    left_out = [
        [row.text("input"), row.text("name"), reasons.setdefault(row.text("reason"), len(reasons))]
        for row in table.rows("left_out", columns.texts("left_out"))
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
        "warnings": table.texts("warnings"),
    }


def _row(row: Fields, settings: int, reasons: dict[str, int]) -> list[Any]:
    setting = row.data.get("setting")
    places = [] if setting is None else setting if isinstance(setting, list) else [setting]
    for place in places:
        if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < settings:
            row.problems.append(RecipeError(f"{row.where}: setting {place} is none of the plan's {settings}"))
            places = []
            break
    reason = row.text("reason")
    if "rank" in row.data:
        made = f"rank {row.count('rank')} x {row.number('scaling'):g} from {', '.join(row.texts('adapters'))}"
        reason = f"{made}; {reason}" if reason else made
    return [
        row.text("name"), row.text("canonical"), row.text("fate"), row.text("dtype"), row.numbers("shape"), places,
        reasons.setdefault(reason, len(reasons)), 1,
    ]  # fmt: skip


def _setting(entry: Fields) -> dict[str, Any]:
    models = entry.texts("models")
    given = entry.object("parameters").data
    parameters = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    method = entry.text("method")
    try:
        words = setting_words(Setting(method, parameters), models)
    except (TypeError, ValueError):
        entry.problems.append(RecipeError(f"{entry.where}: parameters do not fit the models {', '.join(models)}"))
        words = method
    return {"method": method, "parameters": dict(given), "models": models, "words": words}


def _by_reason(left_out: Sequence[Sequence[Any]], reasons: Sequence[str]) -> list[Mapping[str, Any]]:
    counts = Counter((label, reason) for label, _, reason in left_out)
    return [{"input": label, "reason": reasons[reason], "tensors": count} for (label, reason), count in counts.items()]
