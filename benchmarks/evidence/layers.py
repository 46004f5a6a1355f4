"""Where perception and reasoning sit: knockouts before and after a merge, and merges of some layers only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polymerge
from course import DEV, Course
from interview import GENERATION, prompt_file
from into_vlm import delta_recipe
from polymerge.analysis.baseline import THIRDS
from sizes import Size

__all__ = ["WEIGHT", "in_layers"]

WEIGHT = 0.75
"""Of the reasoning delta in the merge that is taken apart."""


def in_layers(course: Course, size: Size, folder: Path, work: Path) -> list[dict[str, Any]]:
    """Drops by layer and by third for two kinds of replacement, and gains of merging a third.

    The replacement `from base` is the control of `uniform`: the weights that the module had before anything was
    learnt on top. That of layer-wise merging is a random delta.
    """
    recipe = delta_recipe(folder, WEIGHT)
    merged = polymerge.merge(recipe, work / "merged", force=True, check=False).folder
    probes = {group: prompt_file(course, {group: size.probed}, "probe", work / "probe" / group) for group in DEV}
    rows = []
    replacements = {
        "uniform": polymerge.Replacement(),
        "from base": polymerge.Replacement("from", source=str(folder / "base")),
    }
    for name, replacement in replacements.items():
        found = polymerge.knockout(
            merged, probes, work / f"knockout {name}", scorer="exact", against=folder / "vlm", replace=replacement,
            samples=0, generation=GENERATION, force=True,
        )  # fmt: skip
        before = {who: {task: score.score for task, score in own.items()} for who, own in found.baseline.items()}
        rows.append({"what": "scores", "replace": name, **before, "prompts": size.probed})
        for summary in found.summary:
            own = {"after": summary.model, "before": summary.against}
            told = {
                when: {third: getattr(thirds, third).drop for third in THIRDS} for when, thirds in own.items() if thirds
            }
            cells = [cell for cell in found.cells if (cell.task, cell.module) == (summary.task, summary.module)]
            told |= {
                "by layer after": [cell.model.drop for cell in cells],
                "by layer before": [cell.against.drop for cell in cells if cell.against],
            }
            rows.append({"what": "knockout", "replace": name, "task": summary.task, "module": summary.module, **told})
    asked = {group: prompt_file(course, {group: size.exam[group]}, "exam", work / "exam" / group) for group in DEV}
    for delta, other in (("reasoning", "reason"), ("random", "random")):
        ranges = polymerge.layerwise(
            delta_recipe(folder, WEIGHT, other=other), asked, work / f"layerwise {delta}", scorer="exact", samples=0,
            generation=GENERATION, force=True,
        )  # fmt: skip
        for one in ranges.ranges:
            gains = {task: score.gain for task, score in one.tasks.items()}
            rows.append({"what": "layerwise", "delta": delta, "range": one.name, "gain": gains})
    return rows
