"""What to try next: a few rules, each of which speaks only where a number of the runs makes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polymerge.reporting.rules.layer_rules import suggest_from_ablation, suggest_from_knockout
from polymerge.reporting.rules.overlap_rules import suggest_from_overlap
from polymerge.reporting.rules.score_rules import suggest_from_scores
from polymerge.reporting.rules.search_rules import suggest_from_search
from polymerge.reporting.suggestion import Suggestion, percent

__all__ = ["CUT", "advise"]

CUT = 0.2
"""Share of an update that a merged adapter may lose to its rank before that is worth a word."""


def advise(data: Mapping[str, Any]) -> list[Suggestion]:
    """Everything that the numbers of a report suggest, that of scores first.

    data  what the JSON of a report holds, but for the advice
    """
    methods = {merge["plan_hash"]: merge["method"] for merge in data["merges"]}
    found: list[Suggestion] = []
    if data["scores"] is not None:
        found += suggest_from_scores(data["scores"])
    for search in data["searches"]:
        found += suggest_from_search(search)
    for overlap in data["overlaps"]:
        found += suggest_from_overlap(overlap, methods.get(overlap["plan_hash"], ""))
    for ablation in data["ablations"]:
        found += suggest_from_ablation(ablation)
    for knockout in data["knockouts"]:
        found += suggest_from_knockout(knockout)
    for merge in data["merges"]:
        error = (merge.get("relative_error") or {}).get("most")
        if error is not None and error > CUT:
            text = f"At the output's rank up to {percent(error, 1)} of a module's update has no room."
            told = {"relative error": error}
            found.append(Suggestion(merge["label"], "Give the merged adapter a higher rank", text, told))
    return found
