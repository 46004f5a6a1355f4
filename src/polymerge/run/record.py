"""What an output says of itself: provenance for machines (polymerge.json) and a model card for people."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from polymerge.methods.table import METHODS
from polymerge.planning import Plan

__all__ = ["RECORD", "model_card", "provenance"]

RECORD = "polymerge.json"
"""Name of the provenance file in an output folder."""

_PACKAGES = ("numpy", "numba", "torch", "transformers", "safetensors")


def provenance(plan: Plan, digests: Mapping[str, str], command: Sequence[str], files: Mapping[str, int]) -> str:
    """Everything that is needed to do the same merge again, and to see that it is the same, as JSON.

    digests   path of each input shard that was read -> its sha256
    command   the command line, or the call, that made the output
    files     name of each output shard -> its size
    """
    fates = Counter(step.fate for step in plan.steps)
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
                "family": entry.family,
                "role": _roles(plan, place),
                "sha256": {name: digest for name, digest in sorted(digests.items()) if _within(name, entry.path)},
            }
            for place, entry in enumerate(plan.inputs)
        ],
        "output": {
            "files": dict(files),
            "tensors": dict(fates),
            "parameters": sum(_elements(step.shape) for step in plan.steps if step.fate != "tied"),
            "merged": [step.name for step in plan.steps if step.fate == "merged"],
        },
        "versions": {"python": platform.python_version(), **_versions()},
    }
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def model_card(plan: Plan, name: str, config: Mapping[str, Any]) -> str:
    """A README.md for the output; the licence is left for its owner to state, since the inputs' licences decide it."""
    row = METHODS[plan.recipe["merge_method"]]
    sources = [entry.source.partition("@")[0] for entry in plan.inputs if _looks_like_hub_id(entry.source)]
    front = {
        "base_model": list(dict.fromkeys(sources)),
        "library_name": "transformers",
        "tags": ["merge", "polymerge"],
    }
    if "vision_config" in config:
        front["pipeline_tag"] = "image-text-to-text"
    fates = Counter(step.fate for step in plan.steps)
    lines = [
        "---",
        yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False).strip(),
        "---",
    ]
    lines += ["", f"# {name}", "", f"A merge made with polymerge by `{row.name}`: {row.title} ({row.source}).", ""]
    lines += ["| model | role |", "|---|---|"]
    lines += [f"| {entry.source} | {', '.join(_roles(plan, place))} |" for place, entry in enumerate(plan.inputs)]
    lines += ["", f"{fates['merged']} tensors are merged, {fates['copied']} are copied from the template unchanged."]
    lines += ["", "```yaml", yaml.safe_dump(dict(plan.recipe), sort_keys=False, allow_unicode=True).strip(), "```", ""]
    lines += [f"`{RECORD}` holds the digests of all inputs, the plan's hash and the versions used.", ""]
    return "\n".join(lines)


def command_line() -> list[str]:
    """The command that is running."""
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    return [program, *sys.argv[1:]]


def _roles(plan: Plan, place: int) -> list[str]:
    roles = ["template"] if place == plan.template else []
    roles += [f"models[{number}]" for number, model in enumerate(plan.models) if model == place]
    return roles + (["base"] if place == plan.base else [])


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _within(file: str, path: str) -> bool:
    return Path(file) == Path(path) or Path(path) in Path(file).parents


def _elements(shape: Sequence[int]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count


def _looks_like_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).exists()
