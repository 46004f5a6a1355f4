"""Read a plan that was written as JSON: what `merge PLAN.json` carries out, on any machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from polymerge.checkpoints.bounds import RECORDS_BYTES, read_bounded
from polymerge.checkpoints.discovery import is_plain
from polymerge.checkpoints.json_objects import parse_json
from polymerge.errors import PolymergeError, RecipeError
from polymerge.families.expressions import Scaled, Stacked, expr_from_json
from polymerge.planning.plan import FORMAT, Companions, Input, LeftOut, Lora, Piece, Plan, Step
from polymerge.recipe.parameters import Setting

__all__ = ["written_plan"]


def written_plan(source: str | os.PathLike[str] | Mapping[str, Any]) -> Plan | None:
    """The plan in a JSON file or a mapping, as written by `Plan.to_json`; None if it is a recipe instead.

    raises RecipeError for a plan of another version, and for one that was modified.
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
    try:
        plan = _plan(data)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise RecipeError(f"{where} is not a valid plan ({error!r}). Plan again") from None
    if data.get("hash", plan.hash) != plan.hash:
        raise RecipeError(f"{where} was modified: its hash is {plan.hash}, the recorded one is {data['hash']}")
    return plan


def _plan(data: Mapping[str, Any]) -> Plan:
    companions = tuple(Companions(**_tuples(one)) for one in data["companions"])
    outside = [name for one in companions for name in (*one.files, *one.dropped) if not is_plain(name)]
    if outside:
        raise RecipeError(f"a plan cannot name files outside of its folders: '{outside[0]}'. Plan again")
    inputs = tuple(Input(**_tuples(entry)) for entry in data["inputs"])
    foreign = [one.folder for one in companions if one.folder != inputs[data["template"]].adapter]
    if foreign:
        raise RecipeError(
            f"a plan cannot take files from '{foreign[0]}', which is not its template's adapter. Plan again"
        )
    return Plan(
        **{one.name: data[one.name] for one in fields(Plan)}
        | {name: tuple(data[name]) for name in ("models", "places", "warnings")}
        | {
            "inputs": inputs,
            "settings": tuple(Setting(one["method"], _tuples(one["parameters"])) for one in data["settings"]),
            "steps": tuple(map(_step, data["steps"])),
            "left_out": tuple(LeftOut(**entry) for entry in data["left_out"]),
            "companions": companions,
        }
    )


def _step(data: Mapping[str, Any]) -> Step:
    pieces = tuple(
        Piece(
            **_tuples(entry)
            | {
                "rows": tuple((start, stop) for start, stop in entry["rows"]),
                "reads": tuple(expr_from_json(expr) for expr in entry["reads"]),
                "base": None if entry["base"] is None else expr_from_json(entry["base"]),
            }
        )
        for entry in data["pieces"]
    )
    view = None if data["view"] is None else expr_from_json(data["view"])
    if view is not None and not isinstance(view, Stacked | Scaled):
        raise RecipeError(f"not a plan: {data['name']} has the view {data['view']!r}, which is not a view. Plan again")
    lora = None if data["lora"] is None else Lora(**_tuples(data["lora"]))
    return Step(**_tuples(data) | {"pieces": pieces, "view": view, "lora": lora})


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
