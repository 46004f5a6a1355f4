"""The model card of an output."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from polymerge.checkpoints.bounds import CONFIG_BYTES, read_bounded
from polymerge.checkpoints.folder import split_source
from polymerge.checkpoints.hub import remote_of
from polymerge.engine.licences import Stated, licence_lines, stated_in
from polymerge.engine.provenance import RECORD, pinned_source, roles
from polymerge.methods.table import METHODS
from polymerge.planning import Input, Plan
from polymerge.planning.text_words import vocabulary_words

__all__ = ["model_card", "read_card", "to_complete", "with_section"]


def model_card(plan: Plan, name: str, config: Mapping[str, Any], lost: Mapping[str, float]) -> str:
    """Format a README.md for the output; its licence is left to its owner, since the inputs' licences decide it.

    What the cards at hand state of those is in it, and `push` completes it by the cards on the hub, and by what was
    measured.

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
    inputs = [f"| {_named(plan.inputs[place])} | {', '.join(roles(plan, place))} |" for place in listed]
    said = _front(front, _commits(plan))
    asked = yaml.safe_dump(dict(plan.recipe), sort_keys=False, allow_unicode=True).strip()
    record = f"`{RECORD}` holds the digests of all inputs, the plan's hash and the versions used."
    text = ["---", said, "---", "", f"# {name}", "", made, "", f"| {kind} | role |", "|---|---|", *inputs, "", *lines]
    return "\n".join([*text, "", "```yaml", asked, "```", "", *to_complete(plan.inputs), "", record, ""])


def to_complete(inputs: Sequence[Input]) -> list[str]:
    """The end of a card, which `push` completes: licences as the cards at hand state them, and what was measured."""
    licences = _section("licences", licence_lines([_stated(entry) for entry in inputs]))
    measured = _section("measured", ["Nothing yet."])
    return ["## Licences of what went in", "", *licences, "", "## Measured", "", *measured]


def _section(name: str, lines: Sequence[str]) -> list[str]:
    """Lines of a card between marks by which `with_section` finds them again."""
    return [f"<!-- polymerge: {name} -->", *lines, f"<!-- polymerge: end of {name} -->"]


def with_section(card: str, name: str, lines: Sequence[str]) -> str | None:
    """A card with other lines between the marks of a section; None if it has no such marks any more."""
    first, *_, last = _section(name, ())
    before, found, rest = card.partition(first)
    _, closed, after = rest.partition(last)
    return "".join([before, "\n".join(_section(name, lines)), after]) if found and closed else None


def _front(front: Mapping[str, Any], commits: Mapping[str, str]) -> str:
    """The metadata as YAML; beside each base model, as a comment, the commit that was merged."""
    said = yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False).strip()
    for model, commit in commits.items():
        said = re.sub(rf"^((?:- |base_model: ){re.escape(model)})$", rf"\1  # {commit}", said, flags=re.M)
    return said


def _commits(plan: Plan) -> dict[str, str]:
    """The commit of each model that came from the hub."""
    pinned = [one.partition("@")[::2] for entry in plan.inputs for one in pinned_source(entry).split("+") if "@" in one]
    return dict(pinned)


def _named(entry: Input) -> str:
    """An input as the recipe names it, with its commit if it came from the hub."""
    commits = pinned_source(entry)
    return f"{entry.source} (`{commits}`)" if commits and commits != entry.source else entry.source


def _stated(entry: Input) -> Stated:
    """What the card in an input's folder says of its licence; cards on the hub are not fetched for a merge."""
    if not entry.path:
        return stated_in(entry.source, None)
    folder = Path(entry.path) if Path(entry.path).is_dir() else Path(entry.path).parent
    return stated_in(entry.source, read_card(folder / "README.md", of=entry.path))


def read_card(file: Path, of: str = "") -> str | None:
    """A card's text; None if there is none at hand that can be read. A folder without one has an empty one.

    of  the path of the model: a folder of links is of the hub, where a card may be that is not here
    """
    try:
        return read_bounded(file, CONFIG_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return None if not of or not Path(of).exists() or remote_of(Path(of)) is not None else ""
    except OSError:
        return None


def _of_checkpoint(plan: Plan, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The card's metadata, and its lines on the tensors of a checkpoint."""
    named = [source for entry in plan.inputs for source in split_source(entry.source) if source]
    sources = [source.partition("@")[0] for source in named if _looks_like_hub_id(source)]
    front: dict[str, Any] = {
        "base_model": list(dict.fromkeys(sources)),
        "base_model_relation": "merge" if sources and len(plan.models) > 1 else None,
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
        "base_model_relation": "adapter" if base and _looks_like_hub_id(str(base)) else None,
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
