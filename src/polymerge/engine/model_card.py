"""The model card of an output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from polymerge.checkpoints.folder import split_source
from polymerge.engine.provenance import RECORD, roles
from polymerge.methods.table import METHODS
from polymerge.planning import Plan
from polymerge.planning.text_words import vocabulary_words

__all__ = ["model_card"]


def model_card(plan: Plan, name: str, config: Mapping[str, Any], lost: Mapping[str, float]) -> str:
    """Format a README.md for the output; the licence is left to its owner, since the inputs' licences decide it.

    config  the template's config.json
    lost    for adapters, the share of each module's norm lost by truncation to its rank
    """
    row = METHODS[plan.recipe["merge_method"]]
    source = f"`{row.name}`: {row.title} ({row.source})."
    if plan.of_adapters:
        front, lines = _of_adapter(plan, lost)
        made, kind = f"LoRA adapters merged with polymerge by {source}", "adapter"
        listed = list(plan.models)
    else:
        front, lines = _of_checkpoint(plan, config)
        made, kind = f"A merge made with polymerge by {source}", "model"
        if not any(step.fate == "merged" for step in plan.steps):
            folded = any(step.fate == "folded" for step in plan.steps)
            what = "with an adapter folded in" if folded else "in fp8 as plain numbers"
            made = f"A model {what}, made with polymerge."
        listed = list(range(len(plan.inputs)))
    inputs = [f"| {plan.inputs[place].source} | {', '.join(roles(plan, place))} |" for place in listed]
    said = yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False).strip()
    asked = yaml.safe_dump(dict(plan.recipe), sort_keys=False, allow_unicode=True).strip()
    record = f"`{RECORD}` holds the digests of all inputs, the plan's hash and the versions used."
    text = ["---", said, "---", "", f"# {name}", "", made, "", f"| {kind} | role |", "|---|---|", *inputs, "", *lines]
    return "\n".join([*text, "", "```yaml", asked, "```", "", record, ""])


def _of_checkpoint(plan: Plan, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The card's metadata, and its lines on the tensors of a checkpoint."""
    named = [source for entry in plan.inputs for source in split_source(entry.source) if source]
    sources = [source.partition("@")[0] for source in named if _looks_like_hub_id(source)]
    front: dict[str, Any] = {
        "base_model": list(dict.fromkeys(sources)),
        "library_name": "transformers",
        "tags": ["merge", "polymerge"],
    }
    if "vision_config" in config:
        front["pipeline_tag"] = "image-text-to-text"
    fates = Counter(step.fate for step in plan.steps)
    folded = f"{fates['folded']} have an adapter folded in, " if fates["folded"] else ""
    folded += f"{fates['dequantized']} are the template's in fp8 as numbers, " if fates["dequantized"] else ""
    line = f"{fates['merged']} tensors are merged, {folded}{fates['copied']} are copied from the template unchanged."
    dtypes = Counter(step.dtype for step in plan.steps if step.fate != "tied")
    if len(dtypes) > 1:
        held = ", ".join(f"{count} are {dtype}" for dtype, count in dtypes.most_common())
        line += f" They are stored in several dtypes: {held}."
    chosen = [f"Vocabulary: {words.partition(': ')[2]}." for words in vocabulary_words(plan.vocabulary)]
    return front, [line, *(["", *chosen] if chosen else [])]


def _of_adapter(plan: Plan, lost: Mapping[str, float]) -> tuple[dict[str, Any], list[str]]:
    """The card's metadata, in PEFT's form, and its lines on the modules of an adapter."""
    base = (plan.config or {}).get("base_model_name_or_path")
    front = {
        "base_model": base if base and _looks_like_hub_id(str(base)) else None,
        "library_name": "peft",
        "tags": ["lora", "merge", "polymerge"],
    }
    modules = [step.lora for step in plan.steps if step.lora is not None]
    ranks, full = ", ".join(map(str, sorted({lora.rank for lora in modules}))), len(plan.steps) - len(modules)
    lines = [f"{len(modules)} modules of rank {ranks}, {full} full weights. Base: {base or 'not said'}."]
    if lost and max(lost.values()) > 0:
        mean, most = sum(lost.values()) / len(lost), max(lost.values())
        lines += ["", f"The rank leaves out {mean:.1%} of the updates' norm on average, {most:.1%} at most."]
    return front, lines


def _looks_like_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).exists()
