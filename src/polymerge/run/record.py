"""What an output says of itself: its provenance, for machines (polymerge.json)."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from math import prod
from pathlib import Path
from typing import Any

from polymerge.planning import AdapterPlan, Input, Plan

__all__ = ["RECORD", "adapter_outcome", "command_line", "outcome", "provenance", "roles"]

RECORD = "polymerge.json"
"""Name of the provenance file in an output folder."""

_PACKAGES = ("numpy", "numba", "torch", "transformers", "safetensors")


def provenance(
    plan: Plan | AdapterPlan, digests: Mapping[str, str], command: Sequence[str], output: Mapping[str, Any]
) -> str:
    """Everything that is needed to do the same merge again, and to see that it is the same, as JSON.

    digests   path of each input shard that was read -> its sha256
    command   the command line, or the call, that made the output
    output    what was written
    """
    record = {
        "polymerge": importlib.metadata.version("polymerge"),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        "recipe": dict(plan.recipe),
        "plan_hash": plan.hash,
        "seed": plan.seed,
        "inputs": [
            {
                "label": entry.label,
                "source": entry.source,
                "path": entry.path,
                **({"adapter": entry.adapter} if entry.adapter else {}),
                "family": entry.family,
                "role": roles(plan, place),
                "sha256": {name: digest for name, digest in sorted(digests.items()) if _within(name, entry)},
            }
            for place, entry in enumerate(plan.inputs)
        ],
        "output": dict(output),
        "versions": {"python": platform.python_version(), **_versions()},
    }
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def outcome(plan: Plan, files: Mapping[str, int]) -> dict[str, Any]:
    """What a checkpoint that was written holds; `files` are its shards, each with its size."""
    return {
        "files": dict(files),
        "tensors": dict(Counter(step.fate for step in plan.steps)),
        "parameters": sum(prod(step.shape) for step in plan.steps if step.fate != "tied"),
        "merged": [step.name for step in plan.steps if step.fate == "merged"],
    }


def adapter_outcome(plan: AdapterPlan, files: Mapping[str, int], errors: Mapping[str, float]) -> dict[str, Any]:
    """What an adapter that was written holds; `errors` is what its ranks have no room for, by module."""
    return {
        "files": dict(files),
        "modules": dict(Counter(step.fate for step in plan.pairs)),
        "full_weights": [step.name for step in plan.extras.steps] if plan.extras else [],
        "ranks": sorted({step.rank for step in plan.pairs}),
        "relative_error": dict(errors),
    }


def command_line() -> list[str]:
    """The command that is running."""
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    return [program, *sys.argv[1:]]


def roles(plan: Plan | AdapterPlan, place: int) -> list[str]:
    """The parts that an input plays."""
    found = ["template"] if place == plan.template else []
    found += [f"models[{number}]" for number, model in enumerate(plan.models) if model == place]
    return found + (["base"] if place == plan.base else [])


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _within(file: str, entry: Input) -> bool:
    paths = [Path(path) for path in (entry.path, entry.adapter) if path]
    return any(path in (Path(file), *Path(file).parents) for path in paths)
