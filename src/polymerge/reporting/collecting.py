"""All that a report shows, put together from the records of runs: the data of the page, and of the JSON beside it."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from polymerge.errors import PolymergeError, refuse_if_any
from polymerge.reporting.advice import advise
from polymerge.reporting.knockout_section import ablation_section, knockout_section
from polymerge.reporting.merge_section import merge_section
from polymerge.reporting.overlap_section import overlap_section
from polymerge.reporting.records import read_sources
from polymerge.reporting.score_section import scores_section
from polymerge.reporting.search_section import search_section

__all__ = ["FORMAT", "VERSION", "collect"]

FORMAT, VERSION = "polymerge report", 1

_SECTIONS = {
    "merges": ("merge", merge_section),
    "overlaps": ("overlap", overlap_section),
    "searches": ("search", search_section),
    "knockouts": ("knockout", knockout_section),
    "ablations": ("ablation", ablation_section),
}


def collect(sources: Sequence[str | os.PathLike[str]], title: str | None = None) -> dict[str, Any]:
    """Everything that the page shows, as JSON data.

    sources  folders of runs, and files of them
    title    of the page; by default made of the first merge

    raises Refused with everything that is wrong with any of them.
    """
    problems: list[PolymergeError] = []
    read = read_sources(sources, problems)
    sections: dict[str, Any] = {
        name: [make(source, problems) for source in read if source.kind == kind]
        for name, (kind, make) in _SECTIONS.items()
    }
    sections["scores"] = scores_section([one for one in read if one.kind == "scores"], sections["merges"], problems)
    refuse_if_any(problems)
    return {
        "format": FORMAT,
        "version": VERSION,
        "polymerge": importlib.metadata.version("polymerge"),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "title": title or _title(sections["merges"]),
        "sources": [{"kind": one.kind, "label": one.label, "file": str(one.file)} for one in read],
        **sections,
        "advice": [asdict(one) for one in advise(sections)],
    }


def _title(merges: Sequence[Mapping[str, Any]]) -> str:
    if not merges:
        return "What the runs say"
    models = [one["label"] for one in merges[0]["inputs"] if any(role.startswith("models[") for role in one["roles"])]
    named = f"{', '.join(models[:-1])} and {models[-1]}" if 1 < len(models) <= 4 else f"{len(models)} models"
    more = f", and {len(merges) - 1} more" if len(merges) > 1 else ""
    return f"{named}, merged by {merges[0]['method']}{more}"
