"""What knockouts and ablations suggest: which layers to merge, and where more questions are needed to tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from polymerge.reporting.knockout_section import THIRDS
from polymerge.reporting.suggestion import Suggestion, percent

__all__ = ["suggest_from_ablation", "suggest_from_knockout"]

EVEN = 1 / 3


def suggest_from_ablation(ablation: Mapping[str, Any]) -> Iterator[Suggestion]:
    """Of each task, a range that gains more than the whole merge."""
    full = next((row for row in ablation["rows"] if row["name"] == "full"), None)
    if full is None:
        return
    for task in ablation["baseline"]:
        best = max(ablation["rows"], key=lambda row: float(row["tasks"][task]["gain"]))
        own, whole = best["tasks"][task], full["tasks"][task]
        if own["gain"] <= whole["gain"]:
            continue
        text = (
            f"On {task} merging layers {best['layers']} gains {own['gain']:.2f} points, the whole {whole['gain']:.2f}."
        )
        numbers = {"gain": own["gain"], "whole": whole["gain"]}
        if own["low"] is not None:
            text += f" Its interval is from {own['low']:.2f} to {own['high']:.2f}"
            doubtful = own["low"] <= whole["gain"]
            text += ", which holds that of the whole: ask more questions first." if doubtful else "."
            numbers |= {"low": own["low"], "high": own["high"]}
        named = f"the {best['name']} layers" if best["name"] in THIRDS else f"layers {best['layers']}"
        yield Suggestion(ablation["label"], f"Merge only {named}", text, numbers)


def suggest_from_knockout(knockout: Mapping[str, Any]) -> Iterator[Suggestion]:
    """Of each task and module, the third of the layers that surely carries more than a third, or none that does."""
    for line in knockout["summary"]:
        third = max(THIRDS, key=lambda name: float(line[name]["share"] or 0))
        share, low, high = (line[third][name] for name in ("share", "low", "high"))
        if line["who"] != "model" or share is None or low is None:
            continue
        text = (
            f"Knocking out {line['module']} costs {line['task']} {line['drop']:.1f} points, {percent(share)} of it in "
            f"the {third} third, with 95 % of the resamples from {percent(low)} to {percent(high)}."
        )
        numbers = {"share": share, "low": low, "high": high, "drop": line["drop"]}
        if low > EVEN:
            title = f"Weigh the {third} layers of {line['module']} with care for {line['task']}"
            text += " Ablate that range, or give it a weight of its own."
        elif high - low > EVEN:
            title = f"Ask more questions to see which layers of {line['module']} {line['task']} needs"
            text += " That tells no third from another."
        else:
            continue
        yield Suggestion(knockout["label"], title, text, numbers)
