"""The provenance of an output, machine-readable: polymerge.json."""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from polymerge.checkpoints.folder import split_source
from polymerge.checkpoints.hub import listed_sha256, pinned
from polymerge.checkpoints.identity import Identity, file_digest, sampled_digest
from polymerge.checkpoints.prefetch import Prefetch, fetched
from polymerge.engine.ancestry import DeltaNorm
from polymerge.engine.finished import version_of
from polymerge.engine.norms import UpdateNorms
from polymerge.methods.own import place_of
from polymerge.planning import Input, Plan, Step
from polymerge.planning.estimate import default_threads

__all__ = [
    "PLAN_VERSION",
    "RECORD",
    "command_line",
    "digests_of",
    "found_out",
    "identities_of",
    "pinned_source",
    "plan_table",
    "provenance",
    "record",
    "roles",
]

RECORD = "polymerge.json"
"""Name of the provenance file in an output folder."""

PLAN_VERSION = 1
"""Version of the format of `plan_table`."""

_STEP = ("name", "canonical", "fate", "dtype", "shape", "setting", "reason")
_PAIR = (*_STEP, "rank", "scaling", "adapters")
_LEFT_OUT = ("input", "name", "reason")

_PACKAGES = ("numpy", "scipy", "numba", "torch", "transformers", "safetensors")


def provenance(plan: Plan, known: Mapping[Path, Identity], command: Sequence[str], output: Mapping[str, Any]) -> str:
    """Everything needed to repeat a merge and to compare the result, as JSON.

    known     what each input file that was read is known by
    command   the command line, or the call, that made the output
    output    what was written
    """
    made: dict[str, Any] = {"recipe": dict(plan.recipe), "plan_hash": plan.hash, "seed": plan.seed}
    made |= {"methods": _methods(plan)} if plan.methods else {}
    made |= {"vocabulary": plan.to_json()["vocabulary"]} if plan.vocabulary is not None else {}
    inputs = [(entry, roles(plan, place)) for place, entry in enumerate(plan.inputs)]
    decomposed = any(step.lora and step.fate == "merged" for step in plan.steps)
    found = record(made, inputs, known, command, output, blas=decomposed)
    text = json.dumps(found, indent=2, ensure_ascii=False)
    return f"{text.removesuffix('}').rstrip()},\n{_one_row_a_line(plan_table(plan))}\n}}\n"


def record(
    made: Mapping[str, Any],
    inputs: Sequence[tuple[Input, list[str]]],
    known: Mapping[Path, Identity],
    command: Sequence[str],
    output: Mapping[str, Any],
    *,
    blas: bool,
) -> dict[str, Any]:
    """What polymerge.json says of any output.

    made    what was asked for: of a merge the recipe, the plan's hash and the seed
    inputs  each with its roles
    blas    whether the libraries for linear algebra decide the last bits of the output
    """
    return {
        "polymerge": version_of("polymerge"),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        **made,
        "inputs": [
            {
                "label": entry.label,
                "source": entry.source,
                **({"wrappers": list(entry.wrappers)} if entry.wrappers else {}),
                **({"pinned": commits} if (commits := pinned_source(entry)) else {}),
                "family": entry.family,
                "role": role,
                **_files(entry, known),
            }
            for entry, role in inputs
        ],
        "output": dict(output),
        "versions": {
            "python": platform.python_version(),
            **{package: found for package in _PACKAGES if (found := version_of(package))},
        },
        **({"blas": _blas()} if blas else {}),
    }


def _methods(plan: Plan) -> dict[str, Any]:
    """The user's own methods: what the code is known by, and the name of its file."""
    return {
        name: {"origin": origin, **({"file": Path(file).name} if (file := place_of(name)) else {})}
        for name, origin in plan.methods.items()
    }


def plan_table(plan: Plan) -> dict[str, Any]:
    """The fate of every tensor, as rows: enough to be read and displayed, not to be executed.

    settings  each with the labels of the models that its lists refer to
    columns   the columns of `steps`, `pairs` and `left_out`, in this order. `setting` is an index into `settings`,
              null if nothing was merged, a list if blocks of one tensor were merged by several; `pairs` are the
              modules of adapters, and `steps` are then their full weights
    """
    labels = [entry.label for entry in plan.inputs]
    settings = []
    for place, setting in enumerate(plan.settings):
        of = next((piece.inputs for step in plan.steps for piece in step.pieces if piece.setting == place), ())
        models = [labels[one] for one in of or plan.models]
        settings.append({"method": setting.method, "parameters": dict(setting.parameters), "models": models})
    columns: dict[str, list[str]] = {"steps": list(_STEP), "left_out": list(_LEFT_OUT)}
    rows: dict[str, list[Any]] = {
        "steps": [_step(step) for step in plan.steps if step.lora is None],
        "left_out": [[labels[one.input], one.name, one.reason] for one in plan.left_out],
    }
    if plan.of_adapters:
        pairs = [
            [*_step(step), step.lora.rank, step.lora.scaling, [labels[place] for place in step.pieces[0].inputs]]
            for step in plan.steps
            if step.lora is not None
        ]
        columns, rows = {"pairs": list(_PAIR), **columns}, {"pairs": pairs, **rows}
    return {"version": PLAN_VERSION, "settings": settings, "columns": columns, **rows, "warnings": [*plan.warnings]}


def found_out(
    plan: Plan, norms: UpdateNorms, deltas: Mapping[str, DeltaNorm], warnings: Sequence[str]
) -> dict[str, Any]:
    """Findings from the values: the relative norms of adapters' updates, or each model's distance from the base."""
    if plan.of_adapters:
        return {"relative_error": dict(norms.lost), "update_norm": norms.to_json(), "warnings": list(warnings)}
    ratios = {label: norm.ratio if isfinite(norm.ratio) else None for label, norm in deltas.items()}
    return {
        **({"delta_norms": ratios} if ratios else {}),
        **({"warnings": list(warnings)} if warnings else {}),
    }


def digests_of(folder: Path) -> dict[str, str]:
    """What each file of an output is known by (`sampled_digest`), by its name in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {file.relative_to(folder).as_posix(): sampled_digest(file) for file in files}


def command_line() -> list[str]:
    """The current command line."""
    path = Path(sys.argv[0] if sys.argv and sys.argv[0] else "python")
    program = path.parent.name if path.name == "__main__.py" else path.name  # python -m polymerge
    return [program, *sys.argv[1:]]


def roles(plan: Plan, place: int) -> list[str]:
    """The roles of an input."""
    found = ["template"] if place == plan.template else []
    found += [f"models[{number}]" for number, model in enumerate(plan.models) if model == place]
    return found + (["base"] if place == plan.base else [])


def _step(step: Step) -> list[Any]:
    found = list(dict.fromkeys(piece.setting for piece in step.pieces if piece.setting is not None))
    setting = found if len(found) > 1 else found[0] if found else None
    reason = step.reason or (f"same as {step.same_as}" if step.same_as else "")
    dtype = "/".join(dict.fromkeys(step.lora.dtypes)) if step.lora else step.dtype
    return [step.name, step.canonical, step.fate, dtype, list(step.shape), setting, reason]


def _one_row_a_line(table: Mapping[str, Any]) -> str:
    """Format the plan as a member of the record, one row per line: full indentation would dominate the file."""
    members = ",\n".join(_members(table))
    return f'  "plan": {{\n{members}\n  }}'


def _members(table: Mapping[str, Any]) -> Iterator[str]:
    for name, value in table.items():
        if isinstance(value, list) and value:
            rows = ",\n".join(f"      {json.dumps(row, ensure_ascii=False)}" for row in value)
            yield f'    "{name}": [\n{rows}\n    ]'
        else:
            yield f'    "{name}": {json.dumps(value, ensure_ascii=False)}'


def _blas() -> list[dict[str, str]]:
    """The libraries for linear algebra in this process: their kernels decide the last bits of merged factors."""
    loaded = [one for one in threadpool_info() if one["user_api"] == "blas"]
    if not loaded:  # one that threadpoolctl does not know, such as Apple's
        built: Any = np.show_config(mode="dicts")
        loaded = [{"internal_api": built["Build Dependencies"]["blas"]["name"]}]
    return [
        {
            "name": str(one["internal_api"]),
            "version": str(one.get("version")),
            "architecture": str(one.get("architecture") or platform.machine()),
        }
        for one in loaded
    ]


def pinned_source(entry: Input) -> str:
    """The source to name in a recipe to get this input again, pinned to its commit if it came from the hub."""
    base, adapter = split_source(entry.source)
    return pinned((base, Path(entry.path)), *([(adapter, Path(entry.adapter))] if adapter else []))


def _files(entry: Input, known: Mapping[Path, Identity]) -> dict[str, dict[str, str]]:
    """What the files of an input are known by, by their names in its folder; after a +, in its adapter's."""
    sampled, sha256 = {}, {}
    for mark, place in (("", entry.path), ("+", entry.adapter)):
        if place:
            folder = Path(place) if Path(place).is_dir() else Path(place).parent
            for file in sorted(file for file in known if file.is_relative_to(folder)):
                name = mark + file.relative_to(folder).as_posix()
                sampled[name], whole = known[file]
                if whole is not None:
                    sha256[name] = whole
    return {"sampled": sampled, "sha256": sha256}


@contextmanager
def identities_of(files: Sequence[Path], prefetch: Prefetch, sha256: bool) -> Iterator[dict[Path, Future[Identity]]]:
    """What files are known by, found out during the merge; those not yet begun are dropped if it fails.

    sha256  compute the digests of whole files, on whatever cores the merge leaves idle
    """
    clerks = ThreadPoolExecutor(default_threads() if sha256 else 1, "polymerge-identity", initializer=_give_way)
    try:
        yield {file: clerks.submit(_identity, file, prefetch, sha256) for file in files}
    finally:
        clerks.shutdown(wait=True, cancel_futures=True)


def _give_way() -> None:
    """Let every other thread go before this one, where a thread has a priority of its own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _identity(file: Path, prefetch: Prefetch, sha256: bool) -> Identity:
    fetched(file)
    _, checked = prefetch.delivered.get(file, (None, None))
    return Identity(sampled_digest(file), checked or (file_digest(file) if sha256 else listed_sha256(file)))
