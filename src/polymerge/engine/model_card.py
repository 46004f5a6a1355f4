"""What an output says of itself to people: a model card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from polymerge.checkpoints.folder import split_source
from polymerge.engine.provenance import RECORD, roles
from polymerge.methods.table import METHODS
from polymerge.planning import AdapterPlan, Plan

__all__ = ["adapter_card", "model_card"]


def model_card(plan: Plan, name: str, config: Mapping[str, Any]) -> str:
    """A README.md for the output; the licence is left for its owner to state, since the inputs' licences decide it."""
    row = METHODS[plan.recipe["merge_method"]]
    named = [source for entry in plan.inputs for source in split_source(entry.source) if source]
    sources = [source.partition("@")[0] for source in named if _looks_like_hub_id(source)]
    front = {
        "base_model": list(dict.fromkeys(sources)),
        "library_name": "transformers",
        "tags": ["merge", "polymerge"],
    }
    if "vision_config" in config:
        front["pipeline_tag"] = "image-text-to-text"
    fates = Counter(step.fate for step in plan.steps)
    lines: list[str] = []
    made = f"A merge made with polymerge by `{row.name}`: {row.title} ({row.source})."
    if not fates["merged"]:
        made = "A model with an adapter folded in, made with polymerge."
    lines += ["", f"# {name}", "", made, ""]
    lines += ["| model | role |", "|---|---|"]
    lines += [f"| {entry.source} | {', '.join(roles(plan, place))} |" for place, entry in enumerate(plan.inputs)]
    folded = f"{fates['folded']} have an adapter folded in, " if fates["folded"] else ""
    lines += [
        "",
        f"{fates['merged']} tensors are merged, {folded}{fates['copied']} are copied from the template unchanged.",
    ]
    dtypes = Counter(step.dtype for step in plan.steps if step.fate != "tied")
    if len(dtypes) > 1:
        held = ", ".join(f"{count} are {dtype}" for dtype, count in dtypes.most_common())
        lines[-1] += f" They are stored in several dtypes: {held}."
    return _card(front, lines, plan.recipe)


def adapter_card(plan: AdapterPlan, name: str, errors: Mapping[str, float]) -> str:
    """A README.md for an adapter, as PEFT's cards are: the base, the library, the recipe."""
    row = METHODS[plan.recipe["merge_method"]]
    base = plan.config.get("base_model_name_or_path")
    front = {
        "base_model": base if base and _looks_like_hub_id(str(base)) else None,
        "library_name": "peft",
        "tags": ["lora", "merge", "polymerge"],
    }
    lines: list[str] = []
    lines += ["", f"# {name}", ""]
    lines += [f"LoRA adapters merged with polymerge by `{row.name}`: {row.title} ({row.source}).", ""]
    lines += ["| adapter | role |", "|---|---|"]
    lines += [f"| {plan.inputs[place].source} | {', '.join(roles(plan, place))} |" for place in plan.models]
    ranks = ", ".join(map(str, sorted({step.rank for step in plan.pairs})))
    full = len(plan.extras.steps) if plan.extras else 0
    lines += ["", f"{len(plan.pairs)} modules of rank {ranks}, {full} full weights. Base: {base or 'not said'}."]
    if errors and max(errors.values()) > 0:
        mean = sum(errors.values()) / len(errors)
        lines += [
            "",
            f"The rank leaves out {mean:.1%} of the updates' norm on average, {max(errors.values()):.1%} at most.",
        ]
    return _card(front, lines, plan.recipe)


def _card(front: Mapping[str, Any], lines: Sequence[str], recipe: Mapping[str, Any]) -> str:
    """A card: what is said of it for machines, its text, the recipe."""
    said = yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False).strip()
    asked = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).strip()
    record = f"`{RECORD}` holds the digests of all inputs, the plan's hash and the versions used."
    return "\n".join(["---", said, "---", *lines, "", "```yaml", asked, "```", "", record, ""])


def _looks_like_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).exists()
